"""``python -m dfad.train``: distil a student from a frozen teacher without any data."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import dfad_kernels
import tyro
from rich.console import Console

from dfad import cli
from dfad.config import DistillConfig
from dfad.engine import choose_device
from dfad.presets import PRESETS
from dfad.recorder import check_folder
from dfad.terminal import configure_logging
from dfad.trainer import Distiller

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Train(cli.Command):
    """Distil a small network from a trained one without any data.

    Exit codes: 0 done; 2 option or configuration; 3 teacher, student or checkpoint; 4 run folder; 5 losses became NaN or
    infinite; 6 evaluation data; 130 and 143 stopped by Ctrl-C or SIGTERM, with a checkpoint.
    """

    settings: Annotated[DistillConfig, tyro.conf.arg(name="")] = DistillConfig()

    run_dir: Path | None = None
    """Folder of the run; runs/PRESET-TIME where not given."""


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    command = cli.parse(Train(preset="digits"), PRESETS, arguments)
    configure_logging()
    config = command.settings
    run_dir = command.run_dir or Path("runs") / time.strftime(f"{command.preset}-%Y%m%d-%H%M%S")
    if command.resume:
        run_dir = command.resume
    else:
        check_folder(run_dir, overwrite=command.overwrite)  # before a teacher is trained for nothing
    device = choose_device(config.device)
    kernels = dfad_kernels.kernel_name(device) if config.fused else "PyTorch reference"
    log.info("Loss kernels: %s on %s.", kernels, device)

    teacher, image_shape, normalisation = load_teacher(config.teacher)
    student = build_student(config)
    evaluate = evaluator(config.evaluate_on, device) if config.evaluate_on else None
    distiller = Distiller(
        teacher, student, config, image_shape=image_shape, normalisation=normalisation, evaluate=evaluate
    )
    result = distiller.fit(run_dir, resume=command.resume is not None, overwrite=command.overwrite)
    teacher_accuracy = evaluate(teacher.to(device)) if evaluate else None
    Console().print(result_table(result, teacher, student, teacher_accuracy))
    log.info("Everything is in %s.", run_dir)


if __name__ == "__main__":
    cli.run(main)
