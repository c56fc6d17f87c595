"""``python -m dfad.teacher``: train a network on data, to distil from it afterwards."""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from dfad import checkpoint, cli
from dfad.cli import to_tree, to_yaml
from dfad.data import open_dataset
from dfad.errors import ConfigurationError, Interrupted, nearest
from dfad.export import save_model
from dfad.interruption import stop_requests
from dfad.recipes import RECIPES, Recipe
from dfad.recorder import Recorder, check_folder, create_folder
from dfad.supervised import SupervisedTrainer
from dfad.terminal import configure_logging

log = logging.getLogger(__name__)

MODEL_FILE = "teacher.safetensors"


@dataclass(frozen=True, kw_only=True)
class Teach(cli.Command):
    """Train a network on labelled images: SGD with Nesterov momentum.

    Exit codes: 0 done; 2 option or configuration; 3 network; 4 run folder; 5 the loss became NaN or infinite; 6 data;
    130 and 143 stopped by Ctrl-C or SIGTERM, with a checkpoint.
    """

    settings: Annotated[Recipe, tyro.conf.arg(name="")] = Recipe()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    command = cli.parse(Teach(preset="digits"), RECIPES, arguments)
    configure_logging()
    recipe = command.settings
    if command.resume:
        run_dir = command.resume
    else:
        run_dir = command.run_dir or Path("runs") / time.strftime(f"teacher-{command.preset}-%Y%m%d-%H%M%S")
        check_folder(run_dir, overwrite=command.overwrite)  # before data are read for nothing
    started = time.perf_counter()
    trainer, accuracy = teach(recipe, run_dir, resume=command.resume is not None, overwrite=command.overwrite)

    table = Table("data", "network", "parameters", "accuracy", "seconds")
    parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    seconds = time.perf_counter() - started
    table.add_row(trainer.dataset.name, recipe.network.factory, f"{parameters:,}", f"{accuracy:.4f}", f"{seconds:.1f}")
    Console().print(table)
    log.info("The teacher is in %s.", run_dir / MODEL_FILE)


def teach(
    recipe: Recipe, run_dir: Path, *, resume: bool = False, overwrite: bool = False
) -> tuple[SupervisedTrainer, float]:
    """Train by a recipe, in a folder of its own, and write the model file; returns its accuracy on the test split.

    Args:
        recipe: how, and on which data.
        run_dir: folder for metrics, checkpoints and the model.
        resume: continue the run in that folder from its last checkpoint.
        overwrite: replace the run in that folder.

    Raises:
        RunFolderError: if the folder does not admit this run.
        Interrupted: as :func:`train`, and whatever else that raises.
    """
    trainer = SupervisedTrainer(recipe, open_dataset(recipe.data))
    if not resume:
        create_folder(run_dir, to_yaml(recipe), overwrite=overwrite)
    elif (state := checkpoint.load(run_dir)) is not None:
        trainer.load_state_dict(state)
    accuracy = train(trainer, run_dir)
    save_model(run_dir / MODEL_FILE, trainer.result.state_dict(), trainer.manifest(accuracy))
    return trainer, accuracy


def train(trainer: SupervisedTrainer, folder: Path | None) -> float:
    """Run all epochs; returns the accuracy on the test split at the end.

    Args:
        trainer: may have some epochs behind it.
        folder: for metrics and, as often as the recipe says, a checkpoint; nothing is written without one.

    Raises:
        Interrupted: after SIGINT or SIGTERM, when the checkpoint of the epoch is written.
        DivergenceError: if the loss becomes NaN or infinite.
    """
    recipe = trainer.recipe
    epochs = recipe.epochs
    accuracy = None

    def due(every: int) -> bool:
        return trainer.epoch % every == 0 or trainer.epoch == epochs

    with (
        stop_requests() as stop,
        Recorder(folder, epochs, trainer.epoch, task="Training the teacher", unit="epoch") as recorder,
    ):
        while trainer.epoch < epochs:
            metrics = {"loss": trainer.train_epoch()}
            if due(recipe.evaluate_every):
                metrics["accuracy"] = accuracy = trainer.accuracy()
            recorder.write(trainer.epoch, metrics)
            stopping = stop.requested  # read once: a signal may come at any moment, and must find its checkpoint
            if folder is not None and (due(recipe.checkpoint_every) or stopping):
                checkpoint.save(folder, trainer.state_dict())
            if stopping:
                where = f" Continue with --resume {folder}." if folder else ""
                raise Interrupted(f"Stopped after epoch {trainer.epoch} of {epochs}.{where}", stop.signal_number)
    return trainer.accuracy() if accuracy is None else accuracy


def cache_folder() -> Path:
    """``$DFAD_CACHE``, else ``$XDG_CACHE_HOME/dfad``, else ``~/.cache/dfad``."""
    if own := os.environ.get("DFAD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfad"


def cached_teacher(name: str, root: Path | None = None) -> Path:
    """The model file of a recipe's teacher; trained on the first call, kept in the cache folder afterwards.

    Args:
        name: of a recipe.
        root: where its data are; a data set such as ``digits`` needs none.

    Raises:
        ConfigurationError: if there is no such recipe, or the cache folder cannot be written.
        DataError: if its data are not there.
    """
    if name not in RECIPES:
        raise ConfigurationError(
            f"There is no teacher recipe {name!r}.{nearest(name, RECIPES)} Choose one of: {', '.join(RECIPES)}."
        )
    recipe = RECIPES[name]
    settings = json.dumps(to_tree(recipe), sort_keys=True)  # without the root: the data are the same wherever they lie
    path = cache_folder() / f"teacher-{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise ConfigurationError(
            f"The cache folder {path.parent} cannot be written: {error.strerror}. Name another with the environment "
            "variable DFAD_CACHE."
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes that need it at once, one trains and the others wait
        if not path.exists():
            log.info("Training the teacher of recipe %s, once; it is kept in %s.", name, path.parent)
            trainer = SupervisedTrainer(recipe, open_dataset(replace(recipe.data, root=root)))
            accuracy = train(trainer, folder=None)
            save_model(path, trainer.result.state_dict(), trainer.manifest(accuracy))
    return path


if __name__ == "__main__":
    cli.run(main)
