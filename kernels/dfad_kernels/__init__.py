"""Fused losses and normalisations as PyTorch operators: C++ kernels on CPUs, Triton kernels on GPUs.

Each has a reference made of PyTorch's operations.
"""

from dfad_kernels.activation_boundary_loss import activation_boundary_loss
from dfad_kernels.batch_norm import batch_norm
from dfad_kernels.batchnorm_distance import batchnorm_distance
from dfad_kernels.frozen_batch_norm import frozen_batch_norm
from dfad_kernels.interpolated_kl_div import interpolated_kl_div
from dfad_kernels.normalized_squared_error import normalized_squared_error
from dfad_kernels.registration import FusedLoss, kernel_name

__all__ = [
    "FusedLoss",
    "activation_boundary_loss",
    "batch_norm",
    "batchnorm_distance",
    "frozen_batch_norm",
    "interpolated_kl_div",
    "kernel_name",
    "normalized_squared_error",
]
