"""Comparisons of the method's parts over several seeds, and the provenance of figures."""
