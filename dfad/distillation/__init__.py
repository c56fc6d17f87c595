"""The method: the round, the run, and what keeps both healthy. It cannot reach data or the command line."""
