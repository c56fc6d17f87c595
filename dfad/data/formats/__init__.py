"""Data set formats; one file per format."""
