"""Slow, readable twins of the layers and of the whole network, for tests."""
