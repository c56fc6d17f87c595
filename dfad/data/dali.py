"""The backend that decodes images when they are needed, with NVIDIA DALI (extra ``dali``)."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfad.data.encoded import EncodedSplit
from dfad.data.plan import Plan
from dfad.errors import DataError, not_installed

THREADS = 4
"""Number of threads that decode on the CPU."""


class DaliBackend:
    """Image files decoded, shifted, mirrored, normalised and cut out by a DALI pipeline.

    The pipeline is fed from outside with the images of a plan, batch by batch. So order and random numbers are the same
    as in every other backend, and the last batch of an epoch is shorter, without the padding and repeating of DALI's
    own readers, which would count images twice in an evaluation.

    Args:
        split: the image files; never decoded as a whole.
        mean: per channel, of pixels in 0–1.
        std: likewise.
        device: of the batches; on a GPU, JPEGs are decoded there.

    Raises:
        DataError: if DALI is not installed.
    """

    name = "dali"

    def __init__(
        self, split: EncodedSplit, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        if not dali_installed():
            raise DataError(
                f"The backend dali needs NVIDIA DALI. {not_installed('NVIDIA DALI', 'dali')} Or use "
                "--data.backend native."
            )
        self.split = split
        self.mean = [255 * value for value in mean]
        self.std = [255 * value for value in std]
        self.device = device
        self._plain: dict[int, bool] = {}

    def batches(self, plan: Plan, batch_size: int, *, drop_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``float32 (B, channels, height, width)`` and labels, on the device."""
        fed: list[Plan] = []

        def feed() -> Iterator[tuple[list[np.ndarray], ...]]:
            for part in plan.batches(batch_size, drop_last=drop_last):
                fed.append(part)
                yield self._inputs(part)

        pipeline = self._pipeline(feed, batch_size, plan.hole_size)
        # without this stream, a GPU's memory could be overwritten before it is read
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        while True:
            try:
                (images,) = pipeline.run(stream)
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._explain(error, fed) from None
            part = fed.pop(0)
            yield torch.from_dlpack(images.as_tensor()), self.split.labels[part.indices].to(self.device)

    def _inputs(self, part: Plan) -> tuple[list[np.ndarray], ...]:
        files = [np.frombuffer(self._read(index), dtype=np.uint8) for index in part.indices.tolist()]
        shifts, flips = (list(changes.to(torch.int32).numpy()) for changes in (part.shifts, part.flips))
        holes = list(part.holes.to(torch.float32).numpy())
        return (files, shifts, flips, holes) if part.hole_size else (files, shifts, flips)

    def _read(self, index: int) -> bytes:
        blob = self.split.blobs[index]
        data = blob.read()
        if self._plain.get(index):
            return data
        rewritten = self.split.plain(blob, data)  # DALI would convert or crop it silently
        self._plain[index] = rewritten is None
        return data if rewritten is None else rewritten

    def _pipeline(self, feed: Callable[[], Iterator[Any]], batch_size: int, hole_size: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        channels, height, width = self.split.image_shape
        on_gpu = self.device.type == "cuda"

        @pipeline_def(
            batch_size=batch_size,
            num_threads=THREADS,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=2,
            exec_dynamic=True,  # keeps the memory of a batch as long as it is referenced
        )
        def carry_out() -> Any:
            files, shifts, flips, *holes = fn.external_source(
                feed,
                num_outputs=4 if hole_size else 3,
                dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT][: 4 if hole_size else 3],
            )
            images = fn.decoders.image(
                files,
                device="mixed" if on_gpu else "cpu",
                output_type=types.GRAY if channels == 1 else types.RGB,
                adjust_orientation=False,  # the native backend does not rotate images either
                jpeg_fancy_upsampling=True,  # like libjpeg by default, and therefore the native backend
            )
            if self.split.resized:
                images = fn.resize(images, size=[height, width], interp_type=types.INTERP_TRIANGULAR)
            images = fn.slice(
                images, start=shifts, shape=[height, width], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
            )
            images = fn.crop_mirror_normalize(
                images, mirror=flips, mean=self.mean, std=self.std, dtype=types.FLOAT, output_layout="CHW"
            )
            if holes:
                images = fn.erase(
                    images, anchor=holes[0], shape=[hole_size, hole_size], axis_names="HW", fill_value=0.0
                )
            return images

        pipeline = carry_out()
        pipeline.build()
        return pipeline

    def _explain(self, error: RuntimeError, fed: list[Plan]) -> DataError:
        """Find the file at which DALI failed, which it does not report, with the other decoder."""
        for part in fed:
            for index in part.indices.tolist():
                try:
                    self.split.decode(self.split.blobs[index])
                except DataError as found:
                    return found
        pending = [self.split.blobs[index] for part in fed for index in part.indices.tolist()]
        return DataError(
            f"DALI cannot decode one of {len(pending)} images from {pending[0]} to {pending[-1]}, though Pillow can. "
            f"Use --data.backend native. DALI says: {error}"
        )


def dali_installed() -> bool:
    """Whether DALI can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # the package nvidia itself is missing
        return False
