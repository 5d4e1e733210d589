"""Scores of single weights, one per file, and the table that names them."""
