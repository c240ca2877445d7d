"""Data: sequences and their loader, text as a stream of characters, windows of a series."""

from tinygrad_lstm.data.sequences import Batch, DataLoader, SequenceDataset, windows
from tinygrad_lstm.data.text import TextCorpus, TextStreams

__all__ = ["Batch", "DataLoader", "SequenceDataset", "TextCorpus", "TextStreams", "windows"]
