"""Offline reinforcement learning with very long contexts."""

__version__ = "0.1.0"
