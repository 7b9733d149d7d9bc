"""Sharded checkpoints in PyTorch's format: written in the background, read without running what they hold."""
