"""Attention sinks over a trajectory: measured, located, told by token, for diffusion and causal language models."""
