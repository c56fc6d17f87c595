"""Generated images as files, with the teacher's soft labels."""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dfad.delivery.classifier import Function
from dfad.errors import ExportError, ModelError, not_installed
from dfad.files import write_text
from dfad.modes import statistics_kept
from dfad.seeds import stream_seed

BATCH_SIZE = 128

DESCRIPTION = "images.json"

STANDARD = (0.5, 0.125)
"""Mean and standard deviation of pixels if the normalisation is unknown, so that 4 standard deviations fit."""


@dataclass(frozen=True)
class GeneratedImages:
    """Images of a run's generator, the same each time.

    Args:
        generator: from its file.
        seed: of the run.
    """

    generator: nn.Module
    seed: int = 0

    @torch.no_grad()
    def batches(self, count: int, stream: str) -> Iterator[Tensor]:
        """Normalised images ``(B, channels, height, width)``, ``count`` in all.

        Args:
            count: number of images.
            stream: name of the random stream; the same name gives the same images.
        """
        rng = torch.Generator().manual_seed(stream_seed(self.seed, stream))
        noise_dim: Any = self.generator.noise_dim
        self.generator.train()  # as in the run: with the batch's own statistics
        with statistics_kept(self.generator):
            for start in range(0, count, BATCH_SIZE):
                noise = torch.randn(BATCH_SIZE, noise_dim, generator=rng)
                yield self.generator(noise)[: count - start]


def to_bytes(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images as ``uint8`` pixels of the same shape."""
    pixels = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def from_bytes(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels as normalised images."""
    return (pixels.float() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def write(
    folder: Path,
    generated: Iterator[Tensor],
    teacher: Function,
    normalisation: tuple[Sequence[float], Sequence[float]],
    *,
    form: Literal["webdataset", "folder"],
    shard_size: int,
) -> int:
    """Write images, labels and soft labels; returns how many.

    The soft labels are the teacher's probabilities for exactly the written pixels, with 8 bits per channel.

    Args:
        folder: to be created.
        generated: batches of normalised images.
        teacher: a function from normalised images to logits.
        normalisation: mean and standard deviation per channel of pixels in 0–1; empty if unknown: half the
            pixel range is then 4 standard deviations.
        form: tar shards of ``KEY.png``, ``KEY.cls`` (the teacher's class) and ``KEY.soft.npy`` (its probabilities); or
            a folder per class of the same images, with ``soft_labels.npy`` and ``files.txt`` in its order.
        shard_size: images per shard.

    Raises:
        ModelError: if images do not have one or three channels, as picture formats need.
        RunFolderError: if the disk is full.
    """
    folder.mkdir()
    mean, std = normalisation
    store: _Shards | _Folders = _Shards(folder, shard_size) if form == "webdataset" else _Folders(folder)
    count = 0
    for images in generated:
        channels = images.shape[1]
        if not mean:
            mean, std = [STANDARD[0]] * channels, [STANDARD[1]] * channels
        if channels not in (1, 3):
            raise ModelError(
                f"Images of {channels} channels cannot be written as pictures; 1 or 3 are needed. Leave out --images."
            )
        pixels = to_bytes(images, mean, std)
        with torch.no_grad():
            probabilities = teacher(from_bytes(pixels, mean, std)).softmax(dim=1)
        for picture, soft in zip(pixels, probabilities.numpy().astype(np.float32), strict=True):
            store.add(f"{count:08d}", _png(picture), soft)
            count += 1
    store.close()
    classes = probabilities.shape[1]
    description = {"images": count, "form": form, "classes": classes, "mean": list(mean), "std": list(std)}
    write_text(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    return count


def check(folder: Path, teacher: Function) -> float:
    """Read everything that was written, and query the teacher again.

    Returns:
        The largest difference of a probability from the written soft label.

    Raises:
        ExportError: if images are missing, or a label is not that of the largest soft label.
    """
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    read: Callable[[Path], Iterator[tuple[bytes, int, Any]]] = (
        _read_shards if description["form"] == "webdataset" else _read_folders
    )
    difference, count = 0.0, 0
    samples = read(folder)
    while batch := list(itertools.islice(samples, BATCH_SIZE)):
        count += len(batch)
        for _, label, soft in batch:
            if label != int(soft.argmax()):
                raise ExportError(f"An image in {folder} has the label {label}, and the soft label {soft.argmax()}.")
        pixels = torch.stack([_pixels(png) for png, _, _ in batch])
        with torch.no_grad():
            found = teacher(from_bytes(pixels, description["mean"], description["std"])).softmax(dim=1).numpy()
        difference = max(difference, float(np.abs(found - np.stack([soft for _, _, soft in batch])).max()))
    if count != description["images"]:
        raise ExportError(f"{folder} holds {count} images; {description['images']} were written.")
    return difference


class _Shards:
    """WebDataset's tar files, in which the files of one image share their name up to the first dot."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self.written = 0
        self.tar: tarfile.TarFile | None = None

    def add(self, key: str, png: bytes, soft: Any) -> None:
        if self.written % self.size == 0:
            self.close()
            self.tar = tarfile.open(self.folder / f"images-{self.written // self.size:06d}.tar", "w")  # noqa: SIM115
        self.written += 1
        for ending, content in (("png", png), ("cls", str(int(soft.argmax())).encode()), ("soft.npy", _npy(soft))):
            entry = tarfile.TarInfo(f"{key}.{ending}")
            entry.size = len(content)
            assert self.tar is not None
            self.tar.addfile(entry, io.BytesIO(content))

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()


class _Folders:
    """A folder of pictures per class."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.soft: list[Any] = []

    def add(self, key: str, png: bytes, soft: Any) -> None:
        name = f"{int(soft.argmax())}/{key}.png"
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_bytes(png)
        self.names.append(name)
        self.soft.append(soft)

    def close(self) -> None:
        (self.folder / "files.txt").write_text("".join(f"{name}\n" for name in self.names), encoding="utf-8")
        np.save(self.folder / "soft_labels.npy", np.stack(self.soft))


def _read_shards(folder: Path) -> Iterator[tuple[bytes, int, Any]]:
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            content: dict[str, bytes] = {}
            for entry in tar:
                file = tar.extractfile(entry)
                assert file is not None
                content[entry.name.partition(".")[2]] = file.read()
                if len(content) == 3:
                    yield content["png"], int(content["cls"]), np.load(io.BytesIO(content["soft.npy"]))
                    content = {}


def _read_folders(folder: Path) -> Iterator[tuple[bytes, int, Any]]:
    names = (folder / "files.txt").read_text(encoding="utf-8").splitlines()
    for name, soft in zip(names, np.load(folder / "soft_labels.npy"), strict=True):
        yield (folder / name).read_bytes(), int(name.partition("/")[0]), soft


def _png(pixels: Tensor) -> bytes:
    image = _pillow().fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _pixels(png: bytes) -> Tensor:
    pixels = torch.from_numpy(np.array(_pillow().open(io.BytesIO(png))))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ModelError(f"Images cannot be written: {not_installed('pillow', 'images')}") from None
    return Image


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
