"""Changes of a run to the process, and their restoration at its end."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dfad.config import EngineConfig
from dfad.engine import Engine, keep_memory
from dfad.engine.precision import float32_products
from tests.engine.test_engine import ALL_OFF, CPU, make

each_end = pytest.mark.parametrize("fails", [False, True], ids=["", "after an error"])


def flags() -> tuple[bool, str, str]:
    return (
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
    )


def gpu_engine(precision: str, *, fused: bool) -> Engine:
    """An engine that assumes to run on a GPU."""
    engine = Engine(ALL_OFF, fused=fused, device=CPU)
    engine.device = torch.device("cuda")
    engine.precision = precision  # type: ignore[assignment]
    return engine


class TestFlags:
    @each_end
    def test_of_a_gpu_are_set_for_the_run_alone(self, fails):
        before = flags()
        engine = gpu_engine("tf32", fused=True)
        assert flags() == before  # to build one changes nothing
        try:
            with engine.running():
                assert flags() == (True, "tf32", "tf32")
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert flags() == before

    def test_are_those_that_the_configuration_asks_for(self):
        before = flags()
        for precision in ("float32", "bfloat16"):  # in which some networks are left in float32
            with gpu_engine(precision, fused=False).running():
                assert flags() == (False, "ieee", "ieee")
            assert flags() == before
        with Engine(EngineConfig(precision="float32"), fused=True, device=CPU).running():
            assert flags() == before

    def test_those_of_the_caller_come_back(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        with gpu_engine("float32", fused=False).running():
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark


class TestFloat32Products:
    @pytest.fixture(params=["highest", "high", "medium"])
    def chosen(self, request) -> Iterator[str]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(request.param)
        yield request.param
        torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize("precision", ["ieee", "tf32"])
    def test_both_interfaces_agree_within_and_are_restored(self, precision, chosen):
        before = flags()
        with float32_products(precision):
            assert flags() == (before[0], precision, precision)
            assert torch.get_float32_matmul_precision() == {"ieee": "highest", "tf32": "high"}[precision]
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
        assert flags() == before
        assert torch.get_float32_matmul_precision() == chosen
        assert torch.backends.cudnn.allow_tf32

    def test_of_a_caller_who_chose_by_one_interface_alone(self):
        conv = torch.backends.cudnn.conv
        conv.fp32_precision = "ieee"
        try:
            with float32_products("tf32"):
                assert flags()[1:] == ("tf32", "tf32")
            assert conv.fp32_precision == "ieee"
        finally:
            conv.fp32_precision = "tf32"


class TestKeptMemory:
    @pytest.fixture
    def calls(self, monkeypatch) -> list[tuple[int, int]]:
        made: list[tuple[int, int]] = []

        class Library:
            def mallopt(self, parameter: int, value: int) -> int:
                made.append((parameter, value))
                return 1

            def malloc_trim(self, pad: int) -> int:
                made.append((0, pad))
                return 1

        monkeypatch.setattr(keep_memory, "_libc", Library)
        return made

    @each_end
    def test_is_a_matter_of_the_run(self, fails, calls, teacher, config):
        distiller = make(teacher, replace(config, engine=replace(ALL_OFF, keep_memory="on")))
        assert not calls
        if fails:
            distiller.run_round = None
        try:
            distiller.fit()
        except TypeError:
            assert fails
        mapped, trimmed = keep_memory.M_MMAP_THRESHOLD, keep_memory.M_TRIM_THRESHOLD
        largest = keep_memory.LARGEST
        assert calls == [(mapped, largest), (trimmed, largest), (mapped, 32 << 20), (trimmed, 64 << 20), (0, 0)]

    def test_switched_off_it_is_left_alone(self, calls, teacher, config):
        make(teacher, replace(config, engine=ALL_OFF)).fit()
        assert not calls

    def test_a_library_that_refuses_is_announced(self, monkeypatch, caplog):
        library = type("Library", (), {"mallopt": lambda *_: 0, "malloc_trim": lambda *_: 0})
        monkeypatch.setattr(keep_memory, "_libc", library)
        with caplog.at_level("INFO", logger="dfad"), keep_memory.keep_memory():
            assert any("refuses to keep blocks" in message for message in caplog.messages)

    @pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has no mallopt")
    def test_pages_are_cleared_before_and_after_a_run_but_not_in_it(self):
        done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, check=True)
        before, within, after = map(int, done.stdout.split())
        assert within < 100
        assert before > 1000
        assert after > 1000


PAGE_FAULTS = """
import resource, torch
from dfad.engine.keep_memory import keep_memory
def faults():
    # Larger than the C library keeps of itself, and larger than their successors: it looks for room for a block and its
    # alignment, so that a hole of the very size is passed over.
    tensors = [torch.ones((1 << 24) + 1024) for _ in range(3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del tensors
    tensors = [torch.ones(1 << 24) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
print(faults())
with keep_memory():
    faults()
    print(faults())
print(faults())
"""
