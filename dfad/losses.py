"""Losses as modules: which equations, over which taps, with which weights. The mathematics is in the operators."""
