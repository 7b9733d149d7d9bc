"""Hugging Face's names, layouts and config of the same weights."""
