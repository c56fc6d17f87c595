"""A run's folder and its records."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dfad.errors import RunFolderError
from dfad.runs.recorder import EVENTS, METRICS, MetricBuffer, Recorder, check_folder, create_folder
from dfad.runs.settings import SETTINGS_FILE


class TestFolder:
    def test_it_is_made_with_its_parents_and_holds_the_settings(self, tmp_path):
        create_folder(tmp_path / "a" / "b", "seed: 1\n", overwrite=False)
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [SETTINGS_FILE]
        assert (tmp_path / "a" / "b" / SETTINGS_FILE).read_text() == "seed: 1\n"

    def test_one_that_was_left_in_its_first_moment_is_admitted(self, tmp_path):
        (tmp_path / (SETTINGS_FILE + ".tmp")).write_text("se")
        create_folder(tmp_path, "seed: 1\n", overwrite=False)
        assert [path.name for path in tmp_path.iterdir()] == [SETTINGS_FILE]

    def test_a_run_is_replaced_whole_and_only_where_asked(self, tmp_path):
        create_folder(tmp_path, "seed: 1\n", overwrite=False)
        (tmp_path / "student.safetensors").write_text("weights")
        (tmp_path / EVENTS).mkdir()
        with pytest.raises(RunFolderError, match="already holds a run"):
            create_folder(tmp_path, "seed: 2\n", overwrite=False)
        assert (tmp_path / "student.safetensors").exists()
        create_folder(tmp_path, "seed: 2\n", overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == [SETTINGS_FILE]
        assert (tmp_path / SETTINGS_FILE).read_text() == "seed: 2\n"

    def test_a_file_in_the_way_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(RunFolderError, match="file is a file"):
                check_folder(folder, overwrite=True)

    def test_a_folder_that_may_not_be_written_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may everything
        with pytest.raises(RunFolderError, match=f"no permission to write to {tmp_path}"):
            check_folder(tmp_path / "run", overwrite=False)


def test_the_buffer_gives_means_since_the_last_reading():
    buffer = MetricBuffer()
    for value in (1.0, 2.0, 6.0):
        buffer.add({"loss": torch.tensor(value), "half": torch.tensor(value / 2, dtype=torch.bfloat16)})
    first = buffer.read()
    assert (first["loss"], first["half"]) == (3, 1.5)
    assert first["rounds_per_second"] > 0
    buffer.add({"loss": torch.tensor(10.0), "half": torch.tensor(5.0)})
    assert buffer.read()["loss"] == 10


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

    def test_a_resumed_run_drops_what_came_after_its_checkpoint(self, tmp_path):
        with Recorder(tmp_path, rounds=6) as recorder:
            for round_index in (1, 2, 3):
                recorder.write(round_index, {"loss": round_index})
        with (tmp_path / METRICS).open("a") as file:
            file.write('{"round": 4, "lo')  # as a kill leaves it
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
        assert caplog.messages == ["Round 2/4  rounds/s 3  student 0.1235"]
