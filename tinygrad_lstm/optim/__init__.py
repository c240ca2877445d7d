"""Optimizers, gradient clipping and learning-rate schedules: PyTorch's formulas, keywords and defaults."""

from typing import TYPE_CHECKING

from tinygrad_lstm.hints import MissingNameError
from tinygrad_lstm.optim.base import Optimizer
from tinygrad_lstm.optim.clip import clip_grad_norm, clip_grad_value
from tinygrad_lstm.optim.first_order import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RMSprop
from tinygrad_lstm.optim.lbfgs import LBFGS
from tinygrad_lstm.optim.schedules import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearWarmup,
    OneCycleLR,
    ReduceLROnPlateau,
    Schedule,
    StepLR,
)

__all__ = [
    "LBFGS", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "CosineAnnealingLR", "ExponentialLR", "LinearWarmup",
    "NAdam", "OneCycleLR", "Optimizer", "RMSprop", "ReduceLROnPlateau", "Schedule", "StepLR", "clip_grad_norm",
    "clip_grad_value",
]  # fmt: skip


if not TYPE_CHECKING:  # a type checker is to find names that do not exist

    def __getattr__(name: str) -> None:
        raise MissingNameError(__name__, name)
