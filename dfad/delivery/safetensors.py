"""The student as a file of this project: weights and a manifest that says how the network is built."""

from pathlib import Path

from dfad.delivery.classifier import Classifier, Delivery, Function
from dfad.models.model_file import load_model, save_model


def write(delivery: Delivery, path: Path) -> None:
    """Write the file.

    Args:
        delivery: the student.
        path: ends in ``.safetensors``.
    """
    added = ("versions", "weights_sha256")
    kept = {name: value for name, value in delivery.manifest.items() if name not in added}
    save_model(path, delivery.network.state_dict(), kept | {"normalise": delivery.normalise})


def read(path: Path) -> Function:
    """The classifier in such a file."""
    network, manifest = load_model(path, taps=())
    return Classifier(network, *((manifest["mean"], manifest["std"]) if manifest["normalise"] else ())).eval()
