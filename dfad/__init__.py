"""Data-free adversarial distillation with activation regularization and virtual interpolation."""
