"""Data sets: reading, indexing, checking, converting, generating, and batches for training and validation."""

from compress.data.dataset import INDEX, Dataset, Index, Problem, Sample
from compress.data.dataset_yaml import DataConfig, load_data
from compress.data.index import index_dataset

__all__ = [
    "INDEX",
    "DataConfig",
    "Dataset",
    "Index",
    "Problem",
    "Sample",
    "index_dataset",
    "load_data",
]
