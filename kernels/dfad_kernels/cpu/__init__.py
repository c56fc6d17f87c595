"""Kernels for CPUs alone, each with its reference beside it."""
