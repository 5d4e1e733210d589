"""Checkpoints out."""
