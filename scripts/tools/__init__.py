"""What other scripts share, training of the embedded model, and reload checks."""
