"""A run's folder and its records."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dfad.runs.recorder import EVENTS, METRICS, MetricBuffer, Recorder, seconds_until


def test_the_buffer_gives_means_since_the_last_reading():
    buffer = MetricBuffer()
    for value in (1.0, 2.0, 6.0):
        buffer.add({"loss": torch.tensor(value), "half": torch.tensor(value / 2, dtype=torch.bfloat16)})
    first = buffer.read()
    assert (first["loss"], first["half"]) == (3, 1.5)
    assert first["rounds_per_second"] > 0
    buffer.add({"loss": torch.tensor(10.0), "half": torch.tensor(5.0)})
    assert buffer.read()["loss"] == 10


def test_seconds_are_those_of_the_rounds_up_to_a_position():
    history = [{"round": done, "rounds_per_second": rate} for done, rate in ((-2, 1.0), (0, 0.5), (10, 2.0), (12, 1.0))]
    assert [seconds_until(position, history, first=-5) for position in (-5, -2, 0, 10, 12)] == [0, 3, 7, 12, 14]
    history[2] = {"round": 10}
    assert seconds_until(12, history, first=-5) == 3 + 4 + 12


class TestRecorder:
    def records(self, folder):
        return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]

    def test_metrics_are_in_the_file_at_once_and_in_tensorboard_in_the_end(self, tmp_path):
        with Recorder(tmp_path, rounds=4) as recorder:
            recorder.write(2, {"loss": 0.5})
            assert self.records(tmp_path) == [{"round": 2, "loss": 0.5}]
            recorder.write(4, {"loss": 0.25, "accuracy": 1.0})
        assert recorder.history == self.records(tmp_path)
        events = EventAccumulator(str(tmp_path / EVENTS)).Reload()
        assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 0.5), (4, 0.25)]

    @pytest.mark.parametrize("damage", ['{"round": 4, "lo', "null\n", "\x00\x00"])  # as a kill or a full disk leave it
    def test_a_resumed_run_drops_what_came_after_its_checkpoint(self, damage, tmp_path):
        with Recorder(tmp_path, rounds=6) as recorder:
            for round_index in (1, 2, 3):
                recorder.write(round_index, {"loss": round_index})
        with (tmp_path / METRICS).open("a") as file:
            file.write(damage)
        with Recorder(tmp_path, rounds=6, start=2) as recorder:
            recorder.write(3, {"loss": 30})
        assert self.records(tmp_path) == [{"round": n, "loss": loss} for n, loss in ((1, 1), (2, 2), (3, 30))]

    def test_without_a_folder_the_history_alone_is_kept(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with Recorder(None, rounds=2, unit="epoch") as recorder:
            recorder.write(1, {"loss": 1.0})
        assert recorder.history == [{"epoch": 1, "loss": 1.0}]
        assert not list(tmp_path.iterdir())

    def test_plain_lines_tell_what_matters(self, caplog):
        with caplog.at_level("INFO", logger="dfad"), Recorder(None, rounds=4) as recorder:
            recorder.write(2, {"student_loss": 0.123456, "rounds_per_second": 3.0, "class_entropy": 0.5})
        assert caplog.messages == ["Round 2/4  student 0.1235  rounds/s 3  1 s left"]

    def test_the_warm_up_has_a_pace_and_an_end_of_its_own(self, caplog):
        with caplog.at_level("INFO"), Recorder(None, 400, -10, first=-10) as recorder:
            recorder.write(-4, {"generator_loss": 1.0, "rounds_per_second": 2.0})
            recorder.write(0, {"generator_loss": 1.0, "rounds_per_second": 2.0})
            recorder.write(10, {"generator_loss": 1.0, "rounds_per_second": 1.0})
        assert caplog.messages == [
            "Warm-up 6/10  generator 1  steps/s 2  2 s of the warm-up left",
            "Round 0/400  generator 1  steps/s 2",
            "Round 10/400  generator 1  rounds/s 1  6 min 30 s left",
        ]

    def test_the_line_says_how_the_agreement_moves_and_what_time_is_left(self, caplog):
        with caplog.at_level("INFO", logger="dfad"), Recorder(None, rounds=4000) as recorder:
            for round_index, agreement in ((10, 0.5), (20, 0.6), (30, 0.7)):
                recorder.write(round_index, {"agreement": agreement, "rounds_per_second": 1.0})
        assert caplog.messages[1:] == [
            "Round 20/4000  agreement 0.6  rounds/s 1  1 h 06 min left",
            "Round 30/4000  agreement 0.7 (rising, +0.200 in 20 rounds)  rounds/s 1  1 h 06 min left",
        ]
