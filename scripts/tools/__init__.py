"""What other scripts share, the embedded model's training, and reload checks."""
