"""Studies, benchmarks and tools; run them from the repository root as `python -m scripts.<room>.<name>`."""
