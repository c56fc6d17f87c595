"""Makers of small data sets in every format."""

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "eel")


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (8, 6), kind: str = "jpeg") -> bytes:
    """A smooth random image, width × height, which JPEG keeps nearly as it is."""
    rng = np.random.default_rng(seed)
    channels = (3,) if mode == "RGB" else ()
    coarse = rng.integers(0, 256, (2, 2, *channels), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR).save(stream, kind)
    return stream.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    """An archive; compressed as its name says."""
    mode = {".gz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write(root: Path, files: dict[str, bytes]) -> Path:
    """Files below a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def mnist_files(*, zipped: bool = True, train: int = 20, test: int = 10) -> dict[str, bytes]:
    """The four files of MNIST, small; image k is filled with the value k."""
    files = {}
    for prefix, count in (("train", train), ("t10k", test)):
        images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 28, 28)).copy()
        files[f"{prefix}-images-idx3-ubyte"] = idx(images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx(np.arange(count, dtype=np.uint8) % 10)
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()} if zipped else files


def cifar_arrays(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``(count, 3072)`` and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, classes, count, dtype=np.uint8)


def python2_pickle(content: dict[bytes, np.ndarray | list[int]]) -> bytes:
    """A dictionary of arrays of bytes and lists as Python 2 wrote it: byte strings, and NumPy's former names."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def encode(value: np.ndarray | list[int]) -> bytes:
        if isinstance(value, list):
            return b"](" + b"".join(map(number, value)) + b"e"
        new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t" + string(b"b") + b"tR"
        shape = b"(" + b"".join(map(number, value.shape)) + b"t"
        dtype = b"cnumpy\ndtype\n(" + string(b"u1") + number(0) + number(1) + b"tR"
        dtype += b"(" + number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        return new + b"(" + number(1) + shape + dtype + b"\x89" + string(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(string(key) + encode(value) for key, value in content.items()) + b"u."


def cifar_files(version: str, classes: int) -> dict[str, bytes]:
    """A small CIFAR-10 (two train batches) or CIFAR-100 in its python or binary version."""
    names = [f"class {number}" for number in range(classes)]
    parts = {"data_batch_1": 7, "data_batch_2": 5, "test_batch": 4} if classes == 10 else {"train": 12, "test": 4}
    files = {}
    for seed, (part, count) in enumerate(parts.items()):
        pixels, labels = cifar_arrays(count, classes, seed)
        if version == "binary":
            coarse = [np.zeros((count, 1), np.uint8)] if classes == 100 else []
            files[f"{part}.bin"] = np.hstack([*coarse, labels[:, None], pixels]).tobytes()
        else:
            key = b"labels" if classes == 10 else b"fine_labels"
            content = {b"data": pixels, key: labels.tolist()}
            # the official files were written by Python 2, copies of them by Python 3
            files[part] = pickle.dumps(content, protocol=4) if seed % 2 else python2_pickle(content)
    if version == "binary":
        meta = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
        files[meta] = ("\n".join(names) + "\n\n").encode()
    else:
        meta, key = ("batches.meta", b"label_names") if classes == 10 else ("meta", b"fine_label_names")
        files[meta] = pickle.dumps({key: [name.encode() for name in names]}, protocol=4)
    return files


def folder_files(per_class: int = 5, **options) -> dict[str, bytes]:
    """Images of three classes, as ``CLASS/N.jpg``."""
    return {
        f"{name}/{number}.jpg": picture(100 * label + number, **options)
        for label, name in enumerate(CLASSES)
        for number in range(per_class)
    }


def below(prefix: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """The same files in a folder."""
    return {f"{prefix}/{name}": content for name, content in files.items()}
