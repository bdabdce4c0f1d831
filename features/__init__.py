"""Features of images: Inception, a small classifier, tensorflow-gan; your own."""

from features.classifier import ClassifierFeatures, train_classifier
from features.extraction import (
    FeatureExtractor,
    extract_features,
    key_digest,
    make_extractor,
    read_statistics,
    statistics_file,
)
from features.inception import InceptionFeatures, find_weights
from features.tfgan import TFHubFeatures, make_backend, tfgan_backend

__all__ = [
    "ClassifierFeatures",
    "FeatureExtractor",
    "InceptionFeatures",
    "TFHubFeatures",
    "extract_features",
    "find_weights",
    "key_digest",
    "make_backend",
    "make_extractor",
    "read_statistics",
    "statistics_file",
    "tfgan_backend",
    "train_classifier",
]
