"""For any damage of a file's bytes, opening returns data or raises an error that names the file."""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfad.data import DataConfig, open_dataset
from dfad.errors import DataError

from .conftest import below, cifar_files, folder_files, mnist_files, tar, write
from .formats.test_webdataset import shard


def cifar_archive(root):
    tar(root / "cifar.tar.xz", below("cifar-10-batches-bin", cifar_files("binary", 10)))


def shards(root):
    tar(root / "train-0.tar", shard(0, 6))
    tar(root / "test-0.tar", shard(6, 6))


LAYOUTS = {
    "mnist, gzipped": ("mnist", lambda root: write(root, mnist_files(zipped=True, train=4, test=3))),
    "mnist": ("mnist", lambda root: write(root, mnist_files(zipped=False, train=4, test=3))),
    "cifar10, python": ("cifar10", lambda root: write(root, cifar_files("python", 10))),
    "cifar10, binary archive": ("cifar10", cifar_archive),
    "image folder": ("folder", lambda root: write(root, folder_files(3))),
    "image archive": ("folder", lambda root: tar(root / "images.tar", folder_files(3))),
    "compressed image archive": ("folder", lambda root: tar(root / "images.tar.gz", folder_files(3))),
    "webdataset": ("webdataset", shards),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_never_surprises(tmp_path, layout, data):
    name, lay_out = LAYOUTS[layout]
    pristine = tmp_path / "pristine"
    if not pristine.exists():
        pristine.mkdir()
        lay_out(pristine)
    damaged = tmp_path / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(pristine, damaged)
    victim = data.draw(st.sampled_from(sorted(path for path in damaged.rglob("*") if path.is_file())), label="file")
    content = bytearray(victim.read_bytes())
    # headers are where a byte matters
    place = data.draw(st.integers(0, min(400, len(content)) - 1) | st.integers(0, len(content) - 1), label="place")
    if data.draw(st.booleans(), label="cut"):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255), label="change")
    victim.write_bytes(content)
    root = next(damaged.iterdir()) if "archive" in layout else damaged
    config = DataConfig(name=name, root=root, test_fraction=0.5)
    try:
        dataset = open_dataset(config)
        dataset.train.decoded()
        dataset.test.decoded()
    except DataError as error:
        message = str(error)
    else:
        return  # pixels and labels may change unnoticed
    assert str(damaged) in message
