"""Features of images: Inception, a small classifier, tensorflow-gan, and their cache."""
