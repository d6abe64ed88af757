"""The suites of `spectralmoe bench`: each a module with `cases` and `count`."""
