"""Figures and tables for documents and papers."""
