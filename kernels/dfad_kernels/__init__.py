"""Fused losses as PyTorch operators: C++ kernels on CPUs, Triton kernels on GPUs, a PyTorch reference beside each."""

from dfad_kernels.activation_boundary_loss import activation_boundary_loss
from dfad_kernels.batch_norm import batch_norm
from dfad_kernels.interpolated_kl_div import interpolated_kl_div
from dfad_kernels.registration import FusedLoss, kernel_name

__all__ = ["FusedLoss", "activation_boundary_loss", "batch_norm", "interpolated_kl_div", "kernel_name"]
