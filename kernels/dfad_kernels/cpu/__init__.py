"""Kernels for CPUs only, each with its reference."""
