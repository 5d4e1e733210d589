"""Structured pruning: units, scores, allocation, plan and surgery."""
