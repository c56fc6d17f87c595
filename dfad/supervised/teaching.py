"""A teacher's run: its epochs, its checkpoints, its model file."""

import logging
from pathlib import Path

from dfad.data import open_dataset
from dfad.models.model_file import save_model
from dfad.runs.folder import open_folder
from dfad.runs.loop import run_loop
from dfad.runs.settings import leaves
from dfad.supervised.recipes import Recipe
from dfad.supervised.trainer import SupervisedTrainer

log = logging.getLogger(__name__)

MODEL_FILE = "teacher.safetensors"


def teach(
    recipe: Recipe, run_dir: Path, *, resume: bool = False, overwrite: bool = False
) -> tuple[SupervisedTrainer, float]:
    """Train by a recipe in a run's folder, and write the model file; returns the trainer and the test accuracy.

    Args:
        recipe: settings and data.
        run_dir: folder for metrics, checkpoints and the model.
        resume: continue the run in that folder from its last checkpoint.
        overwrite: replace the run in that folder.

    Raises:
        RunFolderError: if the run cannot use the folder.
        Interrupted: as :func:`train`, and whatever else that raises.
    """
    trainer = SupervisedTrainer(recipe, open_dataset(recipe.data))
    ranks = trainer.ranks
    ranks.require_equal(**dict(leaves(recipe)), run_dir=run_dir, fingerprint=trainer.dataset.fingerprint)
    state = ranks.of_first(lambda: open_folder(run_dir, recipe, resume=resume, overwrite=overwrite))
    if state is not None:
        trainer.load_state_dict(state)
    accuracy = train(trainer, run_dir)
    if ranks.first:
        save_model(run_dir / MODEL_FILE, trainer.result.state_dict(), trainer.manifest(accuracy))
    return trainer, accuracy


def train(trainer: SupervisedTrainer, folder: Path | None) -> float:
    """Run all epochs; returns the accuracy on the test split at the end.

    Args:
        trainer: new, or after some epochs.
        folder: for metrics and checkpoints; without one, nothing is written.

    Raises:
        Interrupted: after SIGINT or SIGTERM, when the checkpoint of the epoch is written.
        DivergenceError: if the loss becomes NaN or infinite.
    """
    recipe, accuracy = trainer.recipe, None
    with (
        trainer.engine.running(),
        run_loop(
            folder,
            recipe.epochs,
            lambda: trainer.epoch,
            trainer.state_dict,
            recipe.checkpoint_every,
            task="Training the teacher",
            unit="epoch",
            ranks=trainer.ranks,
        ) as loop,
    ):
        for _ in loop:
            metrics = {"loss": trainer.train_epoch()}
            if loop.due(recipe.evaluate_every):
                metrics["accuracy"] = accuracy = trainer.accuracy()
            loop.record(metrics)
    return trainer.accuracy() if accuracy is None else accuracy
