"""``python -m dfad.teacher``: train a network on data, to distil from it afterwards."""

import fcntl
import hashlib
import json
import logging
import os
from pathlib import Path

from dfad.cli import to_tree
from dfad.data import open_dataset
from dfad.errors import ConfigurationError, nearest
from dfad.export import save_model
from dfad.recipes import RECIPES
from dfad.supervised import SupervisedTrainer

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$DFAD_CACHE``, else ``$XDG_CACHE_HOME/dfad``, else ``~/.cache/dfad``."""
    if own := os.environ.get("DFAD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfad"


def cached_teacher(name: str) -> Path:
    """The model file of a recipe's teacher; trained on the first call, kept in the cache folder afterwards.

    Args:
        name: of a recipe whose data set needs no files, such as ``digits``.

    Raises:
        ConfigurationError: if there is no such recipe.
    """
    if name not in RECIPES:
        raise ConfigurationError(
            f"There is no teacher recipe {name!r}.{nearest(name, RECIPES)} Choose one of: {', '.join(RECIPES)}."
        )
    recipe = RECIPES[name]
    settings = json.dumps(to_tree(recipe), sort_keys=True)
    path = cache_folder() / f"teacher-{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes that need it at once, one trains and the others wait
        if not path.exists():
            log.info("Training the teacher of recipe %s, once; it is kept in %s.", name, path.parent)
            trainer = SupervisedTrainer(recipe, open_dataset(recipe.data))
            for _ in range(recipe.epochs):
                trainer.train_epoch()
            accuracy = trainer.accuracy()
            log.info("Its accuracy on the test images: %.4f.", accuracy)
            save_model(path, trainer.result.state_dict(), trainer.manifest(accuracy))
    return path
