"""Routers of this library in the place of a model's own: put in, fitted, folded back, saved."""
