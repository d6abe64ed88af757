"""Training: the loop, its settings, and what it is run on."""
