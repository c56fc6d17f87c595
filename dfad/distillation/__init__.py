"""The method: the round, the run, and their safeguards. It cannot reach data or the command line."""
