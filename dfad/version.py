"""The version of this package, from its metadata: pyproject.toml alone says it."""

import importlib.metadata


def version() -> str:
    """Such as 0.1.0; ``not installed`` where the package is run from a folder."""
    try:
        return importlib.metadata.version("dfad")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
