"""Triton kernels, one module for each operator; imported when an operator is first called on a GPU."""
