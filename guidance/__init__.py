"""Conditional sampling: measurements, conditions, the classifier of noised images."""
