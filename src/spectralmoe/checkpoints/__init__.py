"""Checkpoints of any library: files of tensors, and the routers and experts in them, read without a model."""
