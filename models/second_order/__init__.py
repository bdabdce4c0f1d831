"""Derivatives of layers written out, so that differentiating twice is cheap."""
