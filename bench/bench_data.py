"""Images per second of the data backends: an augmented epoch of each, and what decoding once costs.

The real CIFAR-10 JPEGs are taken where they are (``$DFAD_DATA``, or ``shared/data`` beside the checkout); images of
224×224 pixels are made.
"""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfad.data import AugmentConfig, DataConfig, Dataset, open_dataset, shuffled
from dfad.data.dali import DaliBackend, dali_installed
from dfad.data.native import NativeBackend
from dfad.engine import wait_for

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

REAL = Path(os.environ.get("DFAD_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cifar10-jpeg.tar.xz"

AUGMENT = AugmentConfig(flip=True, translate=4, cutout=8)


def jpeg(seed: int, size: int) -> bytes:
    """A made photograph: noise over eight octaves."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size, size, 3))
    for octave in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), float) / 2**octave
    stream = io.BytesIO()
    Image.fromarray((total / 2).astype(np.uint8)).save(stream, "jpeg", quality=90)
    return stream.getvalue()


@pytest.fixture(
    scope="module", params=["CIFAR-10 JPEGs, 32x32", pytest.param("made JPEGs, 224x224", marks=pytest.mark.full)]
)
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Image files; as many of them as make a second of decoding."""
    if request.param.startswith("CIFAR"):
        if not REAL.exists():
            pytest.skip(f"there is no {REAL}; set DFAD_DATA")
        return open_dataset(DataConfig(name="folder", root=REAL))
    root = tmp_path_factory.mktemp("images")
    for label in range(2):
        (root / str(label)).mkdir()
        for number in range(200):
            (root / str(label) / f"{number}.jpg").write_bytes(jpeg(1000 * label + number, 224))
    return open_dataset(DataConfig(name="folder", root=root, test_fraction=0.5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["native", "dali"])
def test_epoch(benchmark, dataset: Dataset, backend: str, device: str) -> None:
    """Every test image once, in random order, moved, mirrored and cut; on the device."""
    if backend == "dali" and not dali_installed():
        pytest.skip("NVIDIA DALI is not installed (extra dali)")
    kind = {"native": NativeBackend, "dali": DaliBackend}[backend]
    split = dataset.test
    source = kind(split, dataset.mean, dataset.std, torch.device(device))
    plan = shuffled(len(split), dataset.image_shape, AUGMENT, seed=0, epoch=0)

    def epoch() -> None:
        for _images, _labels in source.batches(plan, 128, drop_last=False):
            pass
        wait_for(torch.device(device))

    benchmark.group = f"augmented epoch of {len(split)} images, {dataset.image_shape}, {device}"
    benchmark.pedantic(epoch, rounds=7, warmup_rounds=1)
    describe(benchmark, backend, len(split))


def test_decoding_once(benchmark, dataset: Dataset) -> None:
    """What the native backend does before its first epoch."""
    split = dataset.test
    benchmark.group = f"decoding {len(split)} images once, {dataset.image_shape}"
    benchmark.pedantic(split.decoded, rounds=3)
    describe(benchmark, "native", len(split))


def describe(benchmark, contender: str, images: int) -> None:
    """What the record tells beside the times."""
    benchmark.extra_info["contender"] = contender
    benchmark.extra_info["images_per_second"] = round(images / benchmark.stats.stats.min)
