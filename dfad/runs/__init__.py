"""A run's folder: settings, metrics, checkpoints, interruption, and what a finished run leaves behind."""
