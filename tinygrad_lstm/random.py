"""Random numbers: one explicit generator type, and the default one that ``tg.seed`` seeds.

Everything random in the package (initialisation, dropout, shuffling) draws from a
:class:`Generator`; no function touches NumPy's global state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError

__all__ = ["Generator", "default_generator", "seed", "witnessed"]


_WITNESS: ContextVar[dict[int, Any] | None] = ContextVar("tinygrad_lstm_draws", default=None)


@contextmanager
def witnessed() -> Iterator[dict[int, Any]]:
    """Collect, for a block, every generator that is drawn from, with its state before: id -> (generator, state)."""
    outer = _WITNESS.get()
    drawn: dict[int, Any] = {}
    token = _WITNESS.set(drawn)
    try:
        yield drawn
    finally:
        _WITNESS.reset(token)
        if outer is not None:
            for key, entry in drawn.items():
                outer.setdefault(key, entry)


class Generator:
    """A seeded stream of random numbers (PCG64; O'Neill 2014) whose state can be stored.

    Parameters
    ----------
    seed : int or None
        Non-negative.  ``None`` takes entropy from the operating system.

    Examples
    --------
    >>> g = Generator(7)
    >>> state = g.get_state()
    >>> a = g.uniform(size=3)
    >>> g.set_state(state)
    >>> bool((g.uniform(size=3) == a).all())
    True
    """

    __slots__ = ("_bits",)

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None:
            if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
                raise DTypeError(f"a seed is an int or None, found {seed!r} ({type(seed).__name__})")
            if seed < 0:
                raise ArgumentError(f"a seed is not negative, found {seed}")
        self._bits = np.random.Generator(np.random.PCG64(seed))

    def _stream(self) -> np.random.Generator:
        """The stream to draw from; whoever witnesses draws learns where it was before."""
        witness = _WITNESS.get()
        if witness is not None and id(self) not in witness:
            witness[id(self)] = (self, self.get_state())
        return self._bits

    @property
    def numpy(self) -> np.random.Generator:
        """The NumPy generator that this one draws from (shared, not a copy)."""
        return self._stream()

    def uniform(self, low: float = 0.0, high: float = 1.0, size: Any = None, dtype: Any = np.float64) -> np.ndarray:
        """Uniform numbers in ``[low, high)``: ndarray of shape ``size`` and the given float dtype."""
        return np.asarray(self._stream().uniform(low, high, size), dtype)

    def normal(self, mean: float = 0.0, std: float = 1.0, size: Any = None, dtype: Any = np.float64) -> np.ndarray:
        """Normal numbers: ndarray of shape ``size`` and the given float dtype."""
        return np.asarray(self._stream().normal(mean, std, size), dtype)

    def keep_mask(self, p: float, size: Any) -> np.ndarray:
        """Boolean ndarray, each element True with probability ``1 - p`` (what dropout keeps)."""
        return self._stream().random(size, dtype=np.float32) >= np.float32(p)

    def permutation(self, n: int) -> np.ndarray:
        """A random order of ``range(n)``: int64 ndarray ``(n,)``."""
        return self._stream().permutation(n)

    def integers(self, low: int, high: int, size: Any = None) -> np.ndarray:
        """Integers in ``[low, high)``: int64 ndarray of shape ``size``."""
        return np.asarray(self._stream().integers(low, high, size))

    def spawn(self) -> Generator:
        """A new generator whose stream is independent of this one and of other spawned ones."""
        child = Generator.__new__(Generator)
        child._bits = self._stream().spawn(1)[0]
        return child

    def get_state(self) -> dict[str, Any]:
        """The state as a tree of strings and ints, which ``tg.save`` takes.

        PCG64's words have 128 bits; they are written as decimal strings because JSON readers
        other than Python's lose the low bits of such integers.
        """
        state = self._bits.bit_generator.state
        return {
            "bit_generator": state["bit_generator"],
            "state": str(state["state"]["state"]),
            "inc": str(state["state"]["inc"]),
            "has_uint32": int(state["has_uint32"]),
            "uinteger": int(state["uinteger"]),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`get_state` returned."""
        self._stream()  # as seed()
        try:
            self._bits.bit_generator.state = {
                "bit_generator": state["bit_generator"],
                "state": {"state": int(state["state"]), "inc": int(state["inc"])},
                "has_uint32": int(state["has_uint32"]),
                "uinteger": int(state["uinteger"]),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"this is no state of a Generator: {error!r}; pass what get_state() returned") from None


_default = Generator()


def default_generator() -> Generator:
    """The generator that is used where none is given."""
    return _default


def seed(n: int) -> None:
    """Seed the default generator (initialisation, dropout, shuffling)."""
    bits = Generator(n)._bits
    _default._stream()  # a witness sees this as a draw: what is recorded would be seeded only once
    _default._bits = bits
