"""Routers of this library inside other training frameworks; each module needs its framework and is imported by name."""
