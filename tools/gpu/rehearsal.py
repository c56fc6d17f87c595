"""Small stand-ins for the data of the campaign, in the same formats, made of scikit-learn's digits."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from dfad.models import resnet20

TRAIN, TEST = 32, 8
"""Number of images per class."""


def make(folder: Path) -> tuple[Path, Path, Path]:
    """An archive of JPEGs, one of CIFAR-10's records, and random weights of a ResNet-20."""
    jpeg, lossless, network = folder / "jpeg.tar.xz", folder / "lossless.tar.xz", folder / "resnet20.safetensors"
    if network.exists():
        return jpeg, lossless, network
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    files: dict[str, bytes] = {}
    records: dict[str, list[bytes]] = {"train": [], "test": []}
    for label in range(10):
        for number, pixels in enumerate(digits.images[digits.target == label][: TRAIN + TEST]):
            split = "train" if number < TRAIN else "test"
            grey = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
            image = grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
            stream = io.BytesIO()
            image.save(stream, "jpeg")
            files[f"{split}/{label}/{number:04}.jpg"] = stream.getvalue()
            records[split].append(bytes([label]) + np.asarray(image).transpose(2, 0, 1).tobytes())
    _write(jpeg, files)
    _write(
        lossless,
        {
            "data_batch_1.bin": b"".join(records["train"]),
            "test_batch.bin": b"".join(records["test"]),
            "batches.meta.txt": "\n".join(map(str, range(10))).encode(),
        },
    )
    torch.manual_seed(0)
    save_file(resnet20().state_dict(), network)
    return jpeg, lossless, network


def _write(archive: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(archive, "w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
