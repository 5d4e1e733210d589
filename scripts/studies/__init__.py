"""What pruning costs, compared over seeds."""
