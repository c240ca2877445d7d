"""Ops that draw random numbers.  The mask is drawn first; what is recorded is a plain product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_lstm.checks import check_probability
from tinygrad_lstm.errors import DTypeError, TraceError
from tinygrad_lstm.ops.elementwise import multiply
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.random import Generator, default_generator
from tinygrad_lstm.tape import state
from tinygrad_lstm.tensor import Tensor, asarray


def check_generator(who: str, generator: Any) -> Generator | None:
    """The generator; raises DTypeError unless it is one of this package, or None."""
    if generator is not None and not isinstance(generator, Generator):
        kind = type(generator)
        found = kind.__name__ if kind.__module__ == "builtins" else f"one of {kind.__module__}"
        raise DTypeError(f"{who}: generator is a tg.Generator, found {found}; make one with tg.Generator(seed)")
    return generator


def dropout(x: Any, p: float, generator: Generator | None = None, training: bool = True) -> Any:
    """Zero each element with probability p and divide the others by 1 - p (Srivastava et al. 2014).

    Parameters
    ----------
    x : array or Tensor, any shape, floating dtype
    p : float in [0, 1]
    generator : Generator, optional
        The default one (``tg.seed``) without it.
    training : bool
        False returns x.

    Raises
    ------
    ArgumentError
        p outside of [0, 1].
    DTypeError
        x of integers or booleans (1 / (1 - p) is none), another kind of generator.
    """
    check_generator("dropout", generator)
    check_probability("dropout", p)
    x = asarray(x)
    if training and x.dtype.kind != "f":
        raise DTypeError(f"dropout: x has a floating dtype, found {x.dtype}; convert it with astype(np.float32)")
    if not training or p == 0.0:
        return x
    return multiply(x, dropout_mask(x.shape, p, x.dtype, generator))


def drawn(make: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: Any) -> Tensor:
    """What ``make()`` draws; in a function that is being recorded, a value that is drawn anew at every call."""
    recorder = state().trace
    if recorder is None:
        return Tensor(make())
    draw = getattr(recorder, "draw", None)
    if draw is None:
        raise TraceError(
            "dropout draws numbers, which a recorded body would draw only once; draw the masks before the loop"
        )
    return draw(Aval(tuple(shape), np.dtype(dtype)), make)


def dropout_mask(shape: tuple[int, ...], p: float, dtype: Any, generator: Generator | None = None) -> Tensor:
    """What dropout multiplies by: 0 with probability p, else 1 / (1 - p)."""

    def make() -> np.ndarray:
        keep = (generator or default_generator()).keep_mask(p, shape)
        scale = np.asarray(0.0 if p == 1.0 else 1.0 / (1.0 - p), dtype)
        return np.where(keep, scale, np.zeros((), dtype)) if p < 1.0 else np.zeros(shape, dtype)

    return drawn(make, shape, dtype)


__all__ = ["dropout"]
