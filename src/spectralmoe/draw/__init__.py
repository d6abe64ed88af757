"""Figures for documents and papers."""
