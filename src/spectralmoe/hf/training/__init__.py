"""What the training of a model needs beside its Trainer: terms, resuming, frozen parts, adapters, text as windows."""
