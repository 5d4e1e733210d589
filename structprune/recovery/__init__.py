"""Training a pruned model back against the dense one: losses, data, the teacher's predictions, the trainer."""
