"""FLOPs of a run: those of its convolutions and matrix products; a multiplication and an addition count as two."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode

from dfad.distillation.round import Round
from dfad.engine.fuse_convolutions import chained_flops


def count_flops(round_: Round) -> tuple[int, int]:
    """FLOPs of a whole run and of one round, of all ranks, counted on a warm-up step and a round, which change the
    networks."""
    method, ranks = round_.config.method, round_.ranks.count
    warm_up = method.warm_up * ranks * _flops(round_.warm_up) if method.warm_up else 0
    per_round = ranks * _flops(round_)
    return warm_up + method.rounds * per_round, per_round


def _flops(work: Callable[[], object]) -> int:
    chained = chained_flops()
    with FlopCounterMode(display=False) as flops:
        work()
    return flops.get_total_flops() + chained_flops() - chained
