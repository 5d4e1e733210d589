"""Evaluation: likelihoods, tasks, stored results and paired comparison."""
