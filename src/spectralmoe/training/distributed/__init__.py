"""Training by several processes: what they share, their checkpoints, and the end of all when one ends."""
