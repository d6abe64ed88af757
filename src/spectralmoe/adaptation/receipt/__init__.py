"""The receipt of an update: its values, made by running the model, shown as lines and as a picture."""

from spectralmoe.adaptation.receipt.receipt import Answer, Flip, Held, Moved, Receipt

__all__ = ["Answer", "Flip", "Held", "Moved", "Receipt"]
