"""Data: sequences and their loader, text as a stream of characters, windows of a series."""

from typing import TYPE_CHECKING

from tinygrad_lstm.data.sequences import Batch, DataLoader, SequenceDataset, windows
from tinygrad_lstm.data.text import TextCorpus, TextStreams
from tinygrad_lstm.hints import MissingNameError

__all__ = ["Batch", "DataLoader", "SequenceDataset", "TextCorpus", "TextStreams", "windows"]


if not TYPE_CHECKING:  # a type checker is to find names that do not exist

    def __getattr__(name: str) -> None:
        raise MissingNameError(__name__, name)
