"""The model card of a student: origin, properties and use."""

from pathlib import Path

from dfad.delivery.classifier import Delivery
from dfad.runs.run_page import drawn_at_random, per_channel

CARD = """---
library_name: {library}
pipeline_tag: image-classification
tags:
- image-classification
- knowledge-distillation
- data-free
---

# {title}

An image classifier with {parameters:,} parameters and {classes} classes, distilled from a larger network **without any
data**: a generator made the images on which it learned to agree with its teacher{drawn}. The method is that of
*Enhancing Data-Free Adversarial Distillation with Activation Regularization and Virtual Interpolation* (Qu, Wang, Xiao;
ICASSP 2021, [arXiv 2102.11638](https://arxiv.org/abs/2102.11638)).

| | |
| --- | --- |
{rows}

## Use

{usage}

{images}

## Limits

Accuracy on real images was not used to train or select it{measured}. It repeats its teacher's errors and adds its own.
Like the teacher, it is not reliable for images that differ from those that the teacher was trained on.
"""


def model_card(delivery: Delivery, usage: str, library: str = "pytorch") -> str:
    """The card, in Markdown.

    Args:
        delivery: the student, with settings and result of its run.
        usage: instructions for loading it, in Markdown.
        library: a name from Hugging Face's list.
    """
    result = delivery.about.get("result", {})
    method = delivery.about.get("config", {}).get("method", {})
    channels, height, width = delivery.image_shape
    if delivery.normalise:
        images = f"It takes images `(batch, {channels}, {height}, {width})` of pixels in 0 to 1."
    elif delivery.mean:
        images = (
            f"It takes images `(batch, {channels}, {height}, {width})` of pixels in 0 to 1 that are normalised with "
            f"mean {per_channel(delivery.mean)} and standard deviation {per_channel(delivery.std)}."
        )
    else:
        images = (
            f"It takes images `(batch, {channels}, {height}, {width})`, normalised as its teacher's were; its file "
            "does not say how that was."
        )
    measured = result.get("accuracy") is not None
    return CARD.format(
        library=library,
        title=_title(delivery),
        parameters=delivery.parameters,
        classes=delivery.classes,
        drawn=drawn_at_random(method.get("random_fields", {}).get("share", 0.0)),
        rows="\n".join(f"| {name} | {value} |" for name, value in _rows(delivery).items()),
        usage=usage,
        images=images,
        measured="; the accuracy above was measured on test images" if measured else ", and was not measured",
    )


def _title(delivery: Delivery) -> str:
    architecture = delivery.manifest.get("architecture", {})
    return f"{str(architecture.get('factory') or type(delivery.network).__name__).rpartition(':')[2]}, distilled"


def _rows(delivery: Delivery) -> dict[str, str]:
    config, result = delivery.about.get("config", {}), delivery.about.get("result", {})
    teacher = config.get("teacher", {})
    of_teacher = teacher.get("factory") or Path(teacher.get("checkpoint") or teacher.get("recipe") or "").name
    manifest = delivery.manifest
    rows = {
        "student": f"`{manifest.get('architecture', {}).get('factory')}`",
        "teacher": f"`{of_teacher}`",
        "after round": f"{manifest.get('round')} of {result.get('rounds')}",
    }
    best = manifest.get("round") == result.get("best_round")
    for name, title in (("agreement", "agreement with the teacher on generated images"), ("accuracy", "accuracy")):
        value = result.get(f"best_{name}" if best else name)
        if value is not None:
            of = f" on the test images of {config['data']['name']}" if name == "accuracy" and "data" in config else ""
            rows[title + of] = f"{value:.2%}"
    for name, title in (("images", "images generated"), ("teacher_queries", "teacher queries")):
        if name in result:
            rows[title] = f"{result[name]:,}"
    return rows
