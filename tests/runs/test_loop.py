"""The loop that distilling and teaching share."""

import json
import os
import signal

import pytest

from dfad.errors import Interrupted
from dfad.runs import checkpoint
from dfad.runs.loop import run_loop
from dfad.runs.recorder import METRICS


class Counter:
    """The smallest thing that runs in rounds."""

    def __init__(self, done: int = 0) -> None:
        self.done = done
        self.saved: list[int] = []

    def state_dict(self) -> dict[str, int]:
        self.saved.append(self.done)
        return {"done": self.done}

    def run(self, folder, rounds: int, checkpoint_every: int, record_every: int = 1, at=lambda loop: None):
        with run_loop(folder, rounds, lambda: self.done, self.state_dict, checkpoint_every) as loop:
            for _ in loop:
                self.done += 1
                at(loop)
                if loop.due(record_every):
                    loop.record({"done": self.done})
        return loop.history


def recorded(folder) -> list[int]:
    return [json.loads(line)["round"] for line in (folder / METRICS).read_text().splitlines()]


def test_all_rounds_are_run_and_what_is_due_is_recorded_and_saved(tmp_path):
    counter = Counter()
    history = counter.run(tmp_path, rounds=7, checkpoint_every=3, record_every=2)
    assert counter.saved == [3, 6, 7]
    assert [record["round"] for record in history] == recorded(tmp_path) == [2, 4, 6, 7]
    assert checkpoint.load(tmp_path) == {"done": 7}


def test_a_run_that_is_done_has_no_round_left(tmp_path):
    counter = Counter(done=3)
    assert counter.run(tmp_path, rounds=3, checkpoint_every=1) == []
    assert counter.done == 3


def test_without_a_folder_nothing_is_saved():
    counter = Counter()
    assert len(counter.run(None, rounds=3, checkpoint_every=1)) == 3
    assert not counter.saved


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_after_its_round_and_it_goes_on_from_there(number, tmp_path):
    counter = Counter()

    def interrupt(loop):
        if counter.done == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=rf"Stopped after round 2 of 5\. Continue with --resume {tmp_path}\.") as stop:
        counter.run(tmp_path, 5, checkpoint_every=4, at=interrupt)
    assert stop.value.exit_code == 128 + number
    assert counter.saved == [2]
    resumed = Counter(**checkpoint.load(tmp_path))
    resumed.run(tmp_path, 5, checkpoint_every=4)
    assert recorded(tmp_path) == [1, 2, 3, 4, 5]


def test_a_signal_after_the_question_whether_to_save_waits_for_the_next_round(tmp_path):
    counter, answers = Counter(), []

    def interrupt(loop):
        answers.append(loop.saving)
        os.kill(os.getpid(), signal.SIGTERM)
        answers.append(loop.saving)

    with pytest.raises(Interrupted, match="after round 2 of 5"):
        counter.run(tmp_path, 5, checkpoint_every=4, at=lambda loop: interrupt(loop) if counter.done == 1 else None)
    assert answers == [False, False]
    assert counter.saved == [2]


def test_handlers_are_restored_when_a_round_fails(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        Counter().run(tmp_path, 5, checkpoint_every=1, at=lambda loop: 1 // 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_folder_a_stopped_run_says_that_nothing_was_written():
    with pytest.raises(Interrupted, match=r"Nothing was written: no run_dir was given\."):
        Counter().run(None, 5, checkpoint_every=1, at=lambda loop: os.kill(os.getpid(), signal.SIGTERM))
