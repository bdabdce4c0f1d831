"""Data sets by name, arrays and image files, and the map between data and the values that a model sees."""

from data.arrays import ArraySplit, ConditionSplit, DatasetSplit, HuggingFaceSplit
from data.format import DataFormat, random_flip
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
    "ArraySplit",
    "ConditionSplit",
    "DataFormat",
    "DatasetSplit",
    "FileSplit",
    "HuggingFaceSplit",
    "Split",
    "TensorSplit",
    "TrainingBatches",
    "UnreadableImage",
    "batch_indices",
    "evenly_spaced",
    "load_dataset",
    "random_flip",
]
