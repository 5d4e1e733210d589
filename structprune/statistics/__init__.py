"""Statistics of activations: capture, sinks, norms, moments, Grams."""
