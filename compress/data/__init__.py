"""Data sets: reading, indexing, checking, converting, generating, and batches for training and validation."""

from compress.data.dataset import INDEX, Dataset, Problem, Sample, SplitIndex
from compress.data.dataset_yaml import DataConfig, load_data
from compress.data.index import index_dataset

__all__ = [
    "INDEX",
    "DataConfig",
    "Dataset",
    "Problem",
    "Sample",
    "SplitIndex",
    "index_dataset",
    "load_data",
]
