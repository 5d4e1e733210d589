"""Writing checkpoints, their reports and model cards."""
