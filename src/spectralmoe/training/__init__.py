"""Training: data sets, the loop and its settings."""
