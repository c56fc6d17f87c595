"""Archives: read in place, and refused if they are damaged or refer to paths outside."""

import io
import tarfile

import pytest

from dfad.data.files import Blob, read_tree
from dfad.errors import DataError

from .conftest import tar, write

MEMBERS = {"a/1.txt": b"one", "a/b/2.txt": b"two" * 1000}


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz"])
def test_an_archive_reads_like_its_folder(tmp_path, ending):
    folder = read_tree(write(tmp_path / "folder", MEMBERS))
    archive = read_tree(tar(tmp_path / f"archive{ending}", MEMBERS))
    assert {name: blob.read() for name, blob in archive.files.items()} == MEMBERS
    assert {name: blob.read() for name, blob in folder.files.items()} == MEMBERS
    assert archive.folders == folder.folders == {"a", "a/b"}


def test_the_content_says_whether_an_archive_is_compressed(tmp_path):
    path = tar(tmp_path / "archive.tar.gz", MEMBERS).rename(tmp_path / "archive.tar")
    assert {name: blob.read() for name, blob in read_tree(path).files.items()} == MEMBERS


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE = {
    "above its root": (member("../escaped"), r"member \.\./escaped has a path outside"),
    "above through a folder": (member("a/../../escaped"), "has a path outside"),
    "absolute": (member("/tmp/escaped"), "has a path outside"),
    "symbolic link": (member("link", tarfile.SYMTYPE, "/etc/passwd"), "member link is a link to /etc/passwd"),
    "hard link": (member("link", tarfile.LNKTYPE, "a/1.txt"), "is a link to a/1.txt"),
    "device": (member("null", tarfile.CHRTYPE), "member null is a device"),
    "pipe": (member("pipe", tarfile.FIFOTYPE), "is a device or a pipe"),
}


@pytest.mark.parametrize("ending", [".tar", ".tar.xz"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_named_and_nothing_is_written(tmp_path, kind, ending):
    info, message = HOSTILE[kind]
    inner = tmp_path / "inner"
    inner.mkdir()
    path = tar(inner / f"archive{ending}", MEMBERS)
    with tarfile.open(path, "w:xz" if ending == ".tar.xz" else "w") as archive:
        good = tarfile.TarInfo("a/1.txt")
        good.size = 3
        archive.addfile(good, io.BytesIO(b"one"))
        archive.addfile(info)
    with pytest.raises(DataError, match=message) as raised:
        read_tree(path)
    assert path.name in str(raised.value)
    assert list(tmp_path.rglob("*")) == [inner, path]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz"])
def test_a_truncated_archive_is_named(tmp_path, ending):
    path = tar(tmp_path / f"archive{ending}", MEMBERS)
    content = path.read_bytes()
    path.write_bytes(content[: 1600 if ending == ".tar" else len(content) // 2])
    with pytest.raises(DataError, match=f"archive{ending}.* (truncated|damaged)"):
        [blob.read() for blob in read_tree(path).files.values()]


def test_a_member_cut_after_opening_is_named_with_its_offset(tmp_path):
    path = tar(tmp_path / "archive.tar", MEMBERS)
    blob = read_tree(path).files["a/b/2.txt"]
    path.write_bytes(path.read_bytes()[: blob.offset + 10])
    with pytest.raises(DataError, match=rf"member a/b/2\.txt is truncated: 10 of 3000 bytes .* offset {blob.offset}"):
        blob.read()


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"There is no .*nowhere.*--data\.root"):
        read_tree(tmp_path / "nowhere")
    with pytest.raises(DataError, match="gone.txt cannot be read: No such file"):
        Blob(tmp_path / "gone.txt").read()


def test_what_is_no_archive_is_named(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"data\.zip is neither a folder nor a tar archive"):
        read_tree(tmp_path / "data.zip")
    (tmp_path / "data.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"data\.tar cannot be read, it may be damaged"):
        read_tree(tmp_path / "data.tar")
