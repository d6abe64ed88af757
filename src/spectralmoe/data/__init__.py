"""Data sets by name, folders of images, and single image files."""
