"""Studies of what pruning costs, over several seeds."""
