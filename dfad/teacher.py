"""``python -m dfad.teacher``: train a network on data, to distil it afterwards."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from rich.table import Table

from dfad import cli
from dfad.models.probing import parameter_count
from dfad.ranks import joined
from dfad.supervised.recipes import RECIPES, Recipe
from dfad.supervised.teaching import MODEL_FILE, teach
from dfad.terminal import configure_logging

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Teach(cli.Command):
    """Train a network on labelled images: SGD with Nesterov momentum.

    Exit codes: 0 done; 2 option or configuration; 3 network; 4 run folder; 5 the loss became NaN or infinite; 6 data; 8
    another process of the run has ended or hangs; 130 and 143 stopped by Ctrl-C or SIGTERM, with a checkpoint.
    """

    settings: Annotated[Recipe, cli.Settings] = Recipe()

    preset: str = "digits"
    """Settings to start from: digits, mnist, cifar10, cifar10-fast or cifar100; all but digits need --data.root."""


@joined()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, train the teacher, print its result."""
    command = cli.parse(Teach(), RECIPES, arguments)
    configure_logging()
    recipe = command.settings
    run_dir = command.folder("teacher-")
    started = time.perf_counter()
    trainer, accuracy = teach(recipe, run_dir, resume=command.resumes(run_dir), overwrite=command.overwrite)

    table = Table("data", "network", "parameters", "accuracy", "seconds")
    parameters = parameter_count(trainer.network)
    seconds = time.perf_counter() - started
    table.add_row(trainer.dataset.name, recipe.network.factory, f"{parameters:,}", f"{accuracy:.4f}", f"{seconds:.1f}")
    Console().print(table)
    log.info("The teacher is in %s.", run_dir / MODEL_FILE)


if __name__ == "__main__":
    cli.run(main)
