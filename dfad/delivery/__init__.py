"""What leaves a run: its student in the formats that others read, and its generated images."""
