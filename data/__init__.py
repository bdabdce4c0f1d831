"""Data sets by name, arrays and image files, and the map between grey levels and model values."""

from data.pixels import ImageFormat, random_flip
from data.sets import (
    SETS,
    FileSplit,
    Split,
    TensorSplit,
    TrainingBatches,
    UnreadableImage,
    batch_indices,
    evenly_spaced,
    load_dataset,
)

__all__ = [
    "SETS",
    "FileSplit",
    "ImageFormat",
    "Split",
    "TensorSplit",
    "TrainingBatches",
    "UnreadableImage",
    "batch_indices",
    "evenly_spaced",
    "load_dataset",
    "random_flip",
]
