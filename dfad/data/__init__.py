"""Data sets for training teachers and for measuring; distillation never imports this package."""

from dfad.data.backends import BatchSource, batch_source
from dfad.data.catalog import open_dataset
from dfad.data.config import DataConfig
from dfad.data.dataset import Dataset
from dfad.data.plan import AugmentConfig, Plan, in_order, shuffled

__all__ = [
    "AugmentConfig",
    "BatchSource",
    "DataConfig",
    "Dataset",
    "Plan",
    "batch_source",
    "in_order",
    "open_dataset",
    "shuffled",
]
