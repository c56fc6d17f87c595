"""Export of a run: its student in common formats, and its generated images."""
