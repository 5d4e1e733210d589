"""The small trained model and text of the embedded default."""
