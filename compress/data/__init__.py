"""Datasets: reading, checking, converting, generating, and batches for training and validation."""

from compress.data.dataset_yaml import DataConfig, load_data

__all__ = ["DataConfig", "load_data"]
