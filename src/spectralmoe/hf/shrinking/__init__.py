"""Models of the same family with fewer experts."""
