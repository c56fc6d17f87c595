"""Training of teachers on data, and the cache of those of the recipes."""
