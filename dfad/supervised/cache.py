"""The teachers of the recipes: trained once, kept in the cache folder."""

import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from dfad.data import open_dataset
from dfad.errors import ConfigurationError, unknown
from dfad.models.model_file import save_model
from dfad.ranks import ALONE
from dfad.runs.settings import to_tree
from dfad.supervised.recipes import RECIPES
from dfad.supervised.teaching import train
from dfad.supervised.trainer import SupervisedTrainer

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$DFAD_CACHE``, else ``$XDG_CACHE_HOME/dfad``, else ``~/.cache/dfad``."""
    if own := os.environ.get("DFAD_CACHE"):
        return Path(own)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "dfad"
    try:
        return Path.home() / ".cache" / "dfad"
    except RuntimeError:  # neither HOME nor an entry for the user
        raise ConfigurationError(
            "There is no home folder for the cache. Name a folder with the environment variable DFAD_CACHE."
        ) from None


def cached_teacher(name: str, root: Path | None = None) -> Path:
    """The model file of a recipe's teacher; trained on the first call, kept in the cache folder afterwards.

    Args:
        name: of a recipe.
        root: where its data are; a data set such as ``digits`` needs none.

    Raises:
        ConfigurationError: if there is no such recipe, or the cache folder cannot be written.
        DataError: if its data is missing.
    """
    if name not in RECIPES:
        raise ConfigurationError(unknown("teacher recipe", name, RECIPES))
    recipe = RECIPES[name]
    settings = json.dumps(to_tree(recipe), sort_keys=True)  # without the root: the location of the data does not matter
    path = cache_folder() / f"teacher-{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    if path.exists():  # the file is complete; the folder may be read-only
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock")).acquire()  # of several processes, one trains it and the others wait
    except OSError as error:
        raise ConfigurationError(
            f"The cache folder {path.parent} cannot be written: {error.strerror}. Name another with the environment "
            "variable DFAD_CACHE."
        ) from None
    with lock:
        if not path.exists():
            log.info("Training the teacher of recipe %s, once; it is kept in %s.", name, path.parent)
            trainer = SupervisedTrainer(recipe, open_dataset(replace(recipe.data, root=root)), ALONE)
            accuracy = train(trainer, folder=None)
            save_model(path, trainer.result.state_dict(), trainer.manifest(accuracy))
    return path
