"""Teachers: how they are trained on data, and where those of the recipes are kept."""
