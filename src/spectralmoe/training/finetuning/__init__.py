"""Finetuning of models of Hugging Face, by their Trainer."""
