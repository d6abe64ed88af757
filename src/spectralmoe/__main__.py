"""``python -m spectralmoe``."""

from spectralmoe.cli import main

if __name__ == "__main__":
    main()
