"""Modules: recurrent cells and layers, other layers, losses, initial values."""

from typing import TYPE_CHECKING

from tinygrad_lstm import binding as _binding
from tinygrad_lstm.hints import MissingNameError
from tinygrad_lstm.nn import init, losses
from tinygrad_lstm.nn.basic import Dropout, Embedding, LayerNorm, Linear, Sequential
from tinygrad_lstm.nn.cells import GRUCell, LayerNormLSTMCell, LSTMCell, PeepholeLSTMCell, RNNCell
from tinygrad_lstm.nn.losses import (
    bce_loss,
    bce_with_logits,
    cross_entropy,
    ctc_loss,
    huber_loss,
    l1_loss,
    mse_loss,
    nll_loss,
)
from tinygrad_lstm.nn.module import LoadResult, Module, Parameter
from tinygrad_lstm.nn.recurrent import Bidirectional, Recurrent, Stack
from tinygrad_lstm.nn.regularisation import VariationalDropout, WeightDrop, Zoneout
from tinygrad_lstm.nn.rnn import GRU, LSTM, RNN

# All but the equations of cells: a record names the user's line that called a layer or a loss.
_binding.mark_internal(
    "nn.basic", "nn.ctc", "nn.losses", "nn.module", "nn.programs", "nn.ready", "nn.recurrent", "nn.regularisation",
    "nn.rnn", "nn.states",
)  # fmt: skip

__all__ = [
    "GRU", "LSTM", "RNN", "Bidirectional", "Dropout", "Embedding", "GRUCell", "LSTMCell", "LayerNorm",
    "LayerNormLSTMCell", "Linear", "LoadResult", "Module", "Parameter", "PeepholeLSTMCell", "RNNCell", "Recurrent",
    "Sequential", "Stack", "VariationalDropout", "WeightDrop", "Zoneout", "bce_loss", "bce_with_logits",
    "cross_entropy", "ctc_loss", "huber_loss", "init", "l1_loss", "losses", "mse_loss", "nll_loss",
]  # fmt: skip


if not TYPE_CHECKING:  # a type checker is to find names that do not exist

    def __getattr__(name: str) -> None:
        raise MissingNameError(__name__, name)
