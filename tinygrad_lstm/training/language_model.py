"""A character-level language model: the network, sampling from it, and its checkpoint file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from tinygrad_lstm import nn, ops, serialization
from tinygrad_lstm.checks import check_int, check_number
from tinygrad_lstm.data import TextCorpus, TextStreams
from tinygrad_lstm.data.text import decode, encode
from tinygrad_lstm.errors import ArgumentError, CheckpointError, DTypeError, Error
from tinygrad_lstm.random import Generator, default_generator
from tinygrad_lstm.tape import no_grad
from tinygrad_lstm.tensor import Tensor

__all__ = ["CELLS", "CharLM", "bits_per_character", "load_model", "sample", "save_model"]

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class CharLM(nn.Module):
    """Characters in, logits of the next character out.

    Embedding, then a stack of recurrent layers, then a linear layer (Graves 2013, "Generating
    sequences with recurrent neural networks"; Karpathy et al. 2015).

    Parameters
    ----------
    vocabulary_size : int
    hidden : int
        Units of each recurrent layer.
    layers : int
    cell : {"lstm", "gru", "rnn"}
    embedding : int
        Width of the character vectors; 0 feeds one-hot vectors.
    dropout : float
        On the embedding, between the layers, and before the linear layer (Zaremba et al. 2014).

    Examples
    --------
    >>> model = CharLM(vocabulary_size=5, hidden=8, layers=2)
    >>> logits, state = model(np.zeros((7, 3), int))
    >>> logits.shape
    (7, 3, 5)
    """

    def __init__(
        self,
        vocabulary_size: int,
        hidden: int = 128,
        layers: int = 2,
        cell: str = "lstm",
        embedding: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ArgumentError(f"cell is one of {', '.join(CELLS)}, found {cell!r}")
        for name, value in (("vocabulary_size", vocabulary_size), ("hidden", hidden), ("layers", layers)):
            check_int(name, value)
        check_int("embedding", embedding, 0)
        check_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ArgumentError(f"dropout is in 0 <= p < 1, found {dropout}")
        self.vocabulary_size = vocabulary_size
        self.embedding = nn.Embedding(vocabulary_size, embedding) if embedding else None
        self.recurrent = CELLS[cell](embedding or vocabulary_size, hidden, layers, dropout=dropout if layers > 1 else 0)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, vocabulary_size)

    def forward(self, tokens: Any, state: Any = None) -> tuple[Tensor, Any]:
        """Logits ``(T, B, V)`` and the new state, from int tokens ``(T, B)`` and a state or None."""
        if self.embedding is not None:
            x = self.embedding(tokens)
        else:
            x = ops.one_hot(tokens, self.vocabulary_size, dtype=self.output.weight.dtype)
        y, state = self.recurrent(self.dropout(x), state)
        return self.output(self.dropout(y)), state


def bits_per_character(model: nn.Module, ids: np.ndarray, batch_size: int = 1, seq_len: int = 100) -> float:
    """The mean of ``-log2 p(character)`` over a text, with the state carried from chunk to chunk.

    Every character but the first is predicted once, from all of the text before it.

    Parameters
    ----------
    ids : int array ``(N,)``, N at least 2
    batch_size : int
        Streams in which the text is read side by side (fewer for a short text): sooner done, but each of them starts
        in the middle of the text with nothing before it, which costs bits, and up to ``batch_size - 1`` characters at
        the end are left out.
    """
    streams = TextStreams(ids, max(1, min(batch_size, (len(ids) - 1) // seq_len)), seq_len, drop_last=False)
    total, state = 0.0, None
    training = model.training
    model.eval()
    try:
        with no_grad():
            for inputs, targets in streams:
                logits, state = model(inputs, state)
                total += nn.cross_entropy(logits, targets).item() * targets.size
    finally:
        model.train(training)
    return total / streams.tokens / math.log(2)


def sample(
    model: nn.Module,
    vocabulary: str,
    prompt: str = "\n",
    length: int = 500,
    temperature: float = 1.0,
    generator: Generator | None = None,
) -> str:
    """Text that the model goes on with after ``prompt`` (the prompt is not repeated).

    Parameters
    ----------
    vocabulary : str
        The characters in the order of their ids.
    prompt : str
        At least one character.
    length : int
        Characters to draw.
    temperature : float
        Divides the logits: below 1 more cautious, above 1 more surprising, 0 always the likeliest.
    generator : tg.Generator, optional
        The default generator without it.

    Raises
    ------
    OutOfRangeError
        The prompt has a character that the model does not know.
    ArgumentError
        An empty prompt, a negative length, a temperature that is negative or not finite.
    """
    if not isinstance(model, nn.Module):
        raise DTypeError(f"sample: the model is a Module, found {model!r:.60}")
    check_int("length", length, 0)
    check_number("temperature", temperature)
    if not prompt:
        raise ArgumentError("the prompt is empty; give at least one character")
    if not 0 <= temperature < math.inf:
        raise ArgumentError(f"temperature is at least 0, found {temperature}")
    tokens = encode(prompt, vocabulary)[:, None]
    draw = generator or default_generator()
    state, found = None, []
    training = model.training
    model.eval()
    try:
        with no_grad():
            for _ in range(length):
                logits, state = model(tokens, state)
                found.append(_draw(logits.numpy()[-1, 0], temperature, draw))
                tokens = np.array([[found[-1]]])
    finally:
        model.train(training)
    return decode(found, vocabulary)


def _draw(logits: np.ndarray, temperature: float, generator: Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    # The largest logit is subtracted before dividing: a tiny temperature then cannot overflow to NaN.
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    cumulative = np.cumsum(p)
    u = float(generator.uniform()) * cumulative[-1]
    return min(int(np.searchsorted(cumulative, u, side="right")), len(p) - 1)


def save_model(
    path: str | os.PathLike[str],
    config: dict[str, Any],
    vocabulary: str,
    parameters: dict[str, np.ndarray],
    more: dict[str, Any] | None = None,
) -> None:
    """Write a language model: ``config`` are :class:`CharLM`'s arguments and ``dtype``; ``more`` goes beside them."""
    tree = {"config": config, "vocabulary": vocabulary, "model": parameters, **(more or {})}
    serialization.save(path, tree, metadata={"kind": "char_lm", **config})


def load_model(path: str | os.PathLike[str]) -> tuple[CharLM, dict[str, Any]]:
    """A language model from a file of :func:`save_model`, and the whole tree that the file holds.

    Raises
    ------
    CheckpointError
        The file is damaged, or holds something else.
    """
    tree = serialization.load(path)
    shown = os.fspath(path)
    try:
        if serialization.read_metadata(path).get("kind") != "char_lm":
            raise CheckpointError(f"{shown} holds no language model")
        model = build(tree["config"], len(tree["vocabulary"]))
        model.load_state_dict(tree["model"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, Error) as error:
        raise CheckpointError(f"{shown} holds no language model that this release can read: {error}") from None
    return model, tree


def build(config: dict[str, Any], vocabulary_size: int) -> CharLM:
    """The model that a config describes, with fresh parameters from the default generator."""
    arguments = {name: value for name, value in config.items() if name != "dtype"}
    model = CharLM(vocabulary_size, **arguments)
    model.astype(config["dtype"])
    return model


def held_out_streams(corpus: TextCorpus, batch_size: int = 1, seq_len: int = 100) -> Iterable[Any]:
    """The held-out part as batches for ``Trainer``; the same chunks as :func:`bits_per_character`."""
    batch = max(1, min(batch_size, (len(corpus.held_out) - 1) // seq_len))
    return TextStreams(corpus.held_out, batch, seq_len, drop_last=False)
