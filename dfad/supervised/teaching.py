"""A teacher's run: its epochs, its checkpoints, its model file."""

import logging
from pathlib import Path

from dfad.data import open_dataset
from dfad.errors import Interrupted
from dfad.models.model_file import save_model
from dfad.runs import checkpoint
from dfad.runs.interruption import stop_requests
from dfad.runs.recorder import Recorder, create_folder
from dfad.runs.settings import to_yaml
from dfad.supervised.recipes import Recipe
from dfad.supervised.trainer import SupervisedTrainer

log = logging.getLogger(__name__)

MODEL_FILE = "teacher.safetensors"


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
        trainer.engine.running(),
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
