"""The student as a folder in Hugging Face's format: config.json, model.safetensors and a model card."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from dfad import models
from dfad.delivery.card import model_card
from dfad.delivery.classifier import Classifier, Delivery, Function, member_of_family
from dfad.errors import ModelError
from dfad.files import write_atomically, write_text
from dfad.models.factory import build
from dfad.models.model_file import divided
from dfad.models.weights import load_weights

CODE = """# Lets transformers build this network; it needs: pip install dfad
from dfad.delivery.modeling import DfadConfig, DfadForImageClassification

__all__ = ["DfadConfig", "DfadForImageClassification"]
"""

OWN_USAGE = """```python
from transformers import AutoModelForImageClassification

student = AutoModelForImageClassification.from_pretrained("this-folder")
logits = student(pixel_values=images).logits
```"""

USAGE = """`pip install dfad`{package}.

```python
from transformers import AutoModelForImageClassification

student = AutoModelForImageClassification.from_pretrained("this-folder", trust_remote_code=True)
logits = student(images).logits
```

Without `transformers`: `dfad.delivery.huggingface.read(Path("this-folder"))` gives a function from images to logits."""


def write(delivery: Delivery, folder: Path) -> None:
    """Write the folder.

    A network of ``transformers`` is saved as that package saves its own. Any other network comes with a module that
    builds it by its factory; ``transformers`` loads it only if that module may run (``trust_remote_code``).

    Args:
        delivery: the student.
        folder: to be created.

    Raises:
        ModelError: if the student's file does not say how it is built.
    """
    folder.mkdir()
    own = None if delivery.normalise else member_of_family(delivery.network, "transformers")
    if own is not None:
        own_network: Any = own
        own_network.save_pretrained(folder)
        write_text(folder / "README.md", model_card(delivery, OWN_USAGE, "transformers"))
        _write_preprocessor(delivery, folder)
        return
    architecture = delivery.manifest.get("architecture", {})
    weights, extra = divided(delivery.network.state_dict())
    if extra:
        raise ModelError(
            f"The student has extra state that is no tensor ({', '.join(extra)}), which this format cannot store. "
            "Name the --formats without huggingface."
        )
    config = {
        "model_type": "dfad",
        "architectures": ["DfadForImageClassification"],
        "auto_map": {
            "AutoConfig": "modeling_dfad.DfadConfig",
            "AutoModelForImageClassification": "modeling_dfad.DfadForImageClassification",
        },
        "factory": architecture["factory"],
        "factory_kwargs": architecture.get("kwargs") or {},
        "num_channels": delivery.image_shape[0],
        "image_size": list(delivery.image_shape[1:]),
        "image_mean": delivery.mean,
        "image_std": delivery.std,
        "normalise": delivery.normalise,
        "id2label": {str(label): str(label) for label in range(delivery.classes)},
        "torch_dtype": "float32",
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    # tied weights under each of their names, because transformers does not know the manifest that maps them
    stored = {f"network.{name}": tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    data = save(stored, {"format": "pt"})
    write_atomically(folder / "model.safetensors", lambda file: file.write(data))
    write_text(folder / "modeling_dfad.py", CODE)
    factory = architecture["factory"]
    usage = USAGE.format(package="" if factory in models.__all__ else f", and the package that builds it: `{factory}`")
    write_text(folder / "README.md", model_card(delivery, usage))
    _write_preprocessor(delivery, folder)


def read(folder: Path) -> Function:
    """The classifier in such a folder, without ``transformers`` if that is not needed.

    Raises:
        ModelError: if the folder's weights do not fit what its configuration builds.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "dfad":
        from transformers import AutoModelForImageClassification

        return Classifier(AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)).eval()
    return build_from(config, folder / "model.safetensors")


def build_from(config: dict[str, Any], weights: Path) -> Classifier:
    """The classifier of a ``config.json`` that this module wrote, and its weights."""
    network = build(config["factory"], config["factory_kwargs"])
    load_weights(network, weights)
    normalisation = (config["image_mean"], config["image_std"]) if config["normalise"] else ()
    return Classifier(network.eval(), *normalisation).eval()


def _write_preprocessor(delivery: Delivery, folder: Path) -> None:
    """Settings of ``transformers`` for preparing images, if the normalisation is known."""
    if not delivery.mean:
        return
    _, height, width = delivery.image_shape
    settings = {
        "image_processor_type": "ViTImageProcessor",  # plain: resize, rescale, normalise
        "do_resize": True,
        "size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": not delivery.normalise,
        "image_mean": delivery.mean,
        "image_std": delivery.std,
    }
    write_text(folder / "preprocessor_config.json", json.dumps(settings, indent=2) + "\n")
