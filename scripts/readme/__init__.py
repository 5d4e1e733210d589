"""Tables and pictures of the documentation, made from scripts/results."""
