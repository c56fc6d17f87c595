"""Folders that appear whole or not at all."""

from pathlib import Path

import pytest

from dfad.errors import RunFolderError
from dfad.files import whole_folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        with whole_folder(tmp_path / "folder", overwrite=True) as new:
            (new / "file").write_text(text)
    assert content(tmp_path / "folder") == {"file": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_stays_where_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with (
        pytest.raises(RunFolderError, match="cannot be written: Input/output error"),
        whole_folder(folder, overwrite=True) as new,
    ):
        (new / "file").write_text("new")
    assert content(folder) == {"file": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
