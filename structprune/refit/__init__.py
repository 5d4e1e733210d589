"""Closed-form refits of what pruning leaves, and the products they need."""
