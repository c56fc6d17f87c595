"""A run's folder: settings, metrics, checkpoints, interruption, and the results of a finished run."""
