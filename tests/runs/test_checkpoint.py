"""Checkpoints that survive a kill at any moment."""

import resource

import pytest
import torch

from dfad.errors import RunFolderError
from dfad.files import write_atomically
from dfad.runs import checkpoint


def test_the_newest_is_loaded_and_the_previous_kept(tmp_path):
    for value in range(3):
        checkpoint.save(tmp_path, {"value": torch.tensor(value), "name": "a"})
    assert checkpoint.load(tmp_path)["value"] == 2
    assert torch.load(tmp_path / checkpoint.PREVIOUS, weights_only=True)["value"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.NAME, checkpoint.PREVIOUS}


def test_without_a_checkpoint_there_is_nothing_to_load(tmp_path):
    assert checkpoint.load(tmp_path) is None


def test_a_damaged_newest_falls_back_to_the_previous(tmp_path):
    for value in range(2):
        checkpoint.save(tmp_path, {"value": torch.full((1000,), value)})
    newest = tmp_path / checkpoint.NAME
    newest.write_bytes(newest.read_bytes()[:700])
    assert checkpoint.load(tmp_path)["value"][0] == 0
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"")
    with pytest.raises(RunFolderError, match="No checkpoint in .* can be read"):
        checkpoint.load(tmp_path)


def test_a_write_that_fails_leaves_the_old_content(tmp_path):
    checkpoint.save(tmp_path, {"value": 1})

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(
        RunFolderError, match=r"checkpoint\.pt cannot be written: disk full\. The last whole one is kept"
    ):
        write_atomically(tmp_path / checkpoint.NAME, fail)
    assert checkpoint.load(tmp_path) == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


def test_an_error_of_the_program_is_not_taken_for_a_full_disk(tmp_path):
    def fail(file):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def full_disk():
    """Files of this process cannot grow beyond 100,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_previous_checkpoint_and_leaves_nothing_else(tmp_path, full_disk):
    for value in range(2):
        checkpoint.save(tmp_path, {"value": value})
    with pytest.raises(RunFolderError, match=r"checkpoint\.pt cannot be written: File too large\.") as refused:
        checkpoint.save(tmp_path, {"value": torch.zeros(1_000_000)})
    assert refused.value.exit_code == 4
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.NAME, checkpoint.PREVIOUS}
    assert checkpoint.load(tmp_path) == {"value": 1}
