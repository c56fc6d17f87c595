"""Triton kernels, one module for each operator; imported when an operator first meets a GPU."""
