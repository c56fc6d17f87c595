"""An exported student as a model of ``transformers``, for folders of :mod:`dfad.delivery.huggingface`."""

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from dfad.delivery.classifier import Classifier
from dfad.models.factory import build


class DfadConfig(PretrainedConfig):
    """The factory of the network, and the form of its images."""

    model_type = "dfad"

    def __init__(
        self,
        factory: str = "",
        factory_kwargs: dict[str, Any] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        normalise: bool = False,
        **others: Any,
    ) -> None:
        self.factory = factory
        self.factory_kwargs = factory_kwargs or {}
        self.image_mean = image_mean or []
        self.image_std = image_std or []
        self.normalise = normalise
        super().__init__(**others)


class DfadForImageClassification(PreTrainedModel):
    """A classifier from ``pixel_values`` to logits."""

    config_class = DfadConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DfadConfig) -> None:
        super().__init__(config)
        self.network = build(config.factory, config.factory_kwargs)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """All weights come from the file."""

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        """Logits ``(B, classes)`` of images ``(B, channels, height, width)``."""
        config = self.config
        classifier = Classifier(self.network, *((config.image_mean, config.image_std) if config.normalise else ()))
        return ImageClassifierOutput(logits=classifier.to(pixel_values.device)(pixel_values))
