"""A student that is a network of timm, as a folder for ``timm.create_model``."""

import importlib
import json
from pathlib import Path
from typing import Any

from dfad.delivery.card import model_card
from dfad.delivery.classifier import Classifier, Delivery, Function, member_of_family
from dfad.errors import ModelError, name_of
from dfad.files import write_text

USAGE = """```python
import timm

student = timm.create_model("local-dir:this-folder", pretrained=True).eval()
logits = student(images)
```"""


NORMALISED = "timm's own network has no place for the normalisation that --normalise builds in."


def of_family(delivery: Delivery) -> bool:
    """Whether the student is a network of timm."""
    return member_of_family(delivery.network, "timm") is not None


def write(delivery: Delivery, folder: Path) -> None:
    """Write the folder: timm's own config.json, model.safetensors and a model card.

    Raises:
        ModelError: if the student is not a network of timm, or has the normalisation built in.
    """
    network: Any = member_of_family(delivery.network, "timm")
    if network is None:
        raise ModelError(
            f"The student {name_of(delivery.network)} is not a network of timm. Name the --formats without timm."
        )
    if delivery.normalise:
        raise ModelError(
            f"No timm folder can be written: {NORMALISED} Name the --formats without timm, or leave it out."
        )
    hub = importlib.import_module("timm.models._hub")
    channels, height, width = delivery.image_shape
    # not the size that timm would test the published weights at
    images: dict[str, Any] = {"input_size": [channels, height, width], "test_input_size": None, "test_crop_pct": None}
    if delivery.mean:
        images |= {"mean": delivery.mean, "std": delivery.std}
    known = {name: value for name, value in network.pretrained_cfg.items() if value is not None}
    arguments = {
        name: value for name, value in (delivery.manifest["architecture"].get("kwargs") or {}).items()
        if name not in ("model_name", "pretrained", "num_classes", "checkpoint_path")
    }  # fmt: skip
    hub.save_for_hf(
        network,
        str(folder),
        model_config={"num_classes": delivery.classes, "pretrained_cfg": {**known, **images}},
        model_args=arguments,
        safe_serialization=True,
    )
    write_text(folder / "README.md", model_card(delivery, USAGE, "timm"))


def read(folder: Path) -> Function:
    """The classifier in such a folder."""
    timm = importlib.import_module("timm")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    options = {"in_chans": config["pretrained_cfg"]["input_size"][0], "num_classes": config["num_classes"]}
    return Classifier(timm.create_model(f"local-dir:{folder}", pretrained=True, **options)).eval()
