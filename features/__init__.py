"""Features of images: Inception, a small classifier, tensorflow-gan; your own. FID and its relatives from them."""

from features.classifier import train_classifier
from features.extraction import FeatureExtractor, extract_features
from features.quality import SampleQuality, make_extractor

__all__ = ["FeatureExtractor", "SampleQuality", "extract_features", "make_extractor", "train_classifier"]
