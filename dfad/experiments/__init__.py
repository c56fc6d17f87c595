"""Comparisons of the method's parts over several seeds, and what figures were measured with."""
