"""Latency and memory, measured and predicted."""
