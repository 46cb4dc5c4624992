"""Scores of networks and checkpoints."""
