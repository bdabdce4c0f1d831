"""Distributions whose noised score is known, and the exact law of a sampler on Gaussian data: our oracles."""
