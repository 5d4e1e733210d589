"""Generation by iterative denoising: samplers, their parts, and key/value caches."""
