"""Models: the families, their configuration, and loading of official checkpoints."""
