"""Attention sinks over a trajectory of a diffusion or causal LM: how strong, where, and at which tokens."""
