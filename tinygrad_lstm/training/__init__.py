"""Training: the loop, its callbacks and schedules, and the character-level language model."""

from typing import TYPE_CHECKING

from tinygrad_lstm.hints import MissingNameError
from tinygrad_lstm.training.callbacks import Callback, ProgressBar
from tinygrad_lstm.training.language_model import CharLM, sample
from tinygrad_lstm.training.schedules import Constant, WarmupCosine
from tinygrad_lstm.training.trainer import DivergedError, Trainer

__all__ = ["Callback", "CharLM", "Constant", "DivergedError", "ProgressBar", "Trainer", "WarmupCosine", "sample"]


if not TYPE_CHECKING:  # a type checker is to find names that do not exist

    def __getattr__(name: str) -> None:
        raise MissingNameError(__name__, name)
