"""A run's folder."""

import logging
from dataclasses import replace

import pytest

from dfad.config import DistillConfig, StudentConfig, TeacherConfig
from dfad.data import DataConfig
from dfad.errors import ConfigurationError, RunFolderError
from dfad.presets import TrainConfig
from dfad.runs import checkpoint
from dfad.runs.folder import check_folder, open_folder
from dfad.runs.recorder import EVENTS
from dfad.runs.settings import SETTINGS_FILE, saved_settings
from dfad.runs.snapshots import SNAPSHOTS
from dfad.supervised.teaching import MODEL_FILE
from tests.conftest import RUN_FILES

SETTINGS = DistillConfig(seed=1)


def test_it_is_made_with_its_parents_and_holds_the_settings(tmp_path):
    folder = tmp_path / "a" / "b"
    assert open_folder(folder, SETTINGS) is None
    assert [path.name for path in folder.iterdir()] == [SETTINGS_FILE]
    assert saved_settings(folder, DistillConfig()) == SETTINGS


def test_one_that_was_left_in_its_first_moment_is_admitted(tmp_path):
    (tmp_path / (SETTINGS_FILE + ".tmp")).write_text("se")
    open_folder(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [SETTINGS_FILE]


def test_a_run_is_replaced_whole_and_only_where_asked(tmp_path):
    open_folder(tmp_path, SETTINGS)
    folders = {EVENTS, SNAPSHOTS}
    for name in {*RUN_FILES, MODEL_FILE} - {SETTINGS_FILE, *folders}:
        (tmp_path / name).write_text("of the run")
    for name in folders:
        (tmp_path / name).mkdir()
    own = {"notes.txt", "photo.png", "backup.pt", "student-of-march.safetensors"}
    for name in own:
        (tmp_path / name).write_text("a user's")
    with pytest.raises(RunFolderError, match="already holds a run"):
        open_folder(tmp_path, DistillConfig(seed=2))
    assert (tmp_path / "student.safetensors").exists()
    open_folder(tmp_path, DistillConfig(seed=2), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {SETTINGS_FILE, *own}
    assert saved_settings(tmp_path, DistillConfig()).seed == 2


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_run_whose_network_the_new_one_needs_is_not_replaced(role, tmp_path):
    open_folder(tmp_path, SETTINGS)
    weights = tmp_path / MODEL_FILE
    weights.write_text("weights")
    part = {"teacher": TeacherConfig, "student": StudentConfig}[role]
    for given in (part(factory=str(weights)), part(checkpoint=weights)):
        with pytest.raises(RunFolderError, match=r"teacher\.safetensors, which the run needs, is in .* clears"):
            open_folder(tmp_path, replace(SETTINGS, **{role: given}), overwrite=True)
    assert weights.read_text() == "weights"


def test_exported_images_that_the_new_run_needs_are_kept_and_a_users_own_files_are_no_reason(tmp_path):
    open_folder(tmp_path, TrainConfig())
    images, own = tmp_path / "export" / "images", tmp_path / "images"
    for root in (images, own):
        root.mkdir(parents=True)
    with pytest.raises(RunFolderError, match="export/images, which the run needs, is in .* clears"):
        open_folder(tmp_path, TrainConfig(data=DataConfig("folder", images)), overwrite=True)
    assert images.exists()
    open_folder(tmp_path, TrainConfig(data=DataConfig("folder", own)), overwrite=True)
    assert own.exists()
    assert not images.exists()


def test_other_files_than_a_runs_are_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="files that are not a run's"):
        open_folder(tmp_path, SETTINGS, overwrite=True)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunFolderError, match="file is a file"):
            check_folder(folder, SETTINGS, overwrite=True)


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may everything
    with pytest.raises(RunFolderError, match=f"no permission to write to {tmp_path}"):
        check_folder(tmp_path / "run", SETTINGS)


class TestResumed:
    def test_it_gives_the_state_to_continue_from(self, tmp_path):
        open_folder(tmp_path, SETTINGS)
        checkpoint.save(tmp_path, {"round": 3})
        assert open_folder(tmp_path, SETTINGS, resume=True) == {"round": 3}

    def test_without_a_checkpoint_it_says_that_it_starts_again(self, tmp_path, caplog):
        open_folder(tmp_path, SETTINGS)
        with caplog.at_level(logging.WARNING):
            assert open_folder(tmp_path, SETTINGS, resume=True) is None
        assert "stopped before its first checkpoint" in caplog.text

    def test_other_settings_are_refused_by_the_library_with_an_error_of_its_own(self, tmp_path):
        open_folder(tmp_path, SETTINGS)
        for refuse in (check_folder, open_folder):
            with pytest.raises(ConfigurationError, match=r"Changed: seed 1 → 2\."):
                refuse(tmp_path, DistillConfig(seed=2), resume=True)

    def test_a_damaged_settings_file_is_refused_with_its_place(self, tmp_path):
        open_folder(tmp_path, SETTINGS)
        (tmp_path / SETTINGS_FILE).write_text("method: {rounds: many}")
        with pytest.raises(ConfigurationError, match=r"config\.yaml sets method\.rounds to 'many'"):
            open_folder(tmp_path, SETTINGS, resume=True)

    def test_a_folder_without_a_run_is_refused(self, tmp_path):
        with pytest.raises(ConfigurationError, match="holds no config.yaml"):
            open_folder(tmp_path, SETTINGS, resume=True)
