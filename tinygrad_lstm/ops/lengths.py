"""The lengths of the sequences of a batch: checked where their values are known.

While a function is recorded, lengths that are one of its arguments have no values.  Their dtype and shape are checked
then, and an equation of the program checks the range when it runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm.errors import DTypeError, OutOfRangeError, ShapeError
from tinygrad_lstm.ops.elementwise import less
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.tensor import Tensor, to_array
from tinygrad_lstm.trace import TracedTensor

__all__ = ["check_lengths", "valid_steps"]


def _in_range(array: np.ndarray, *, steps: int, who: str) -> np.ndarray:
    if array.size and (array.min() < 0 or array.max() > steps):
        bad = array[(array < 0) | (array > steps)][0]
        raise OutOfRangeError(f"{who}: length {bad} is outside of 0..{steps}")
    return array.astype(np.int64)


in_range: Primitive = Primitive(
    "lengths_in_range", _in_range, None, differentiable=False, register=False,
    shape=lambda array, steps, who: Aval(array.shape, np.dtype(np.int64)),
    doc="Integers in 0..steps as int64; raises OutOfRangeError for any other.",
)  # fmt: skip


def check_lengths(lengths: Any, steps: int, batch: int, who: str = "scan") -> Any:
    """``lengths`` as an int64 array (B,), every one in 0..T; as a tensor where a function is being recorded."""
    traced = isinstance(lengths, TracedTensor)
    array: Any = lengths if traced else to_array(lengths)
    if array.size == 0 and not traced:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise DTypeError(f"{who}: lengths are integers, found {array.dtype}; round and convert them first")
    if array.shape != (batch,):
        raise ShapeError(f"{who}: lengths of shape {array.shape}, expected ({batch},): one per row of the batch")
    if not traced:
        return _in_range(array, steps=steps, who=who)
    made = getattr(lengths._node, "record", lengths._node)
    if made is not None and made.primitive is in_range and made.params["steps"] == steps:
        return lengths  # a layer has checked them, and names itself
    return in_range(lengths, steps=steps, who=who)


def valid_steps(lengths: Any, steps: int) -> Tensor:
    """Booleans (T, B): whether a step is within its sequence.  ``lengths`` were checked."""
    if isinstance(lengths, Tensor):
        return less(np.arange(steps)[:, None], lengths)
    return Tensor(np.arange(steps)[:, None] < lengths)
