"""The operands of ops from what users write beside tensors: numbers, lists, arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.dtypes import is_weak
from tinygrad_lstm.tensor import Tensor, asarray, read, to_array

__all__ = ["as_operands", "together"]


def _as_operand(value: Any) -> Any:
    """An operand of a primitive: a Tensor as it is, a number as a (weak) Python number, the rest as an array.

    NumPy scalars count as Python numbers: ``x32 * np.sqrt(64)`` stays float32 (the one deviation from NEP 50).
    """
    if isinstance(value, Tensor) or value.__class__ is float or value.__class__ is int:
        return value
    if isinstance(value, np.generic) and value.dtype.kind in "fiub":
        number = value.item()
        if isinstance(number, (int, float)) and number.__class__ is not bool:
            return number  # a long double stays one
    return asarray(value)


def as_operands(values: Sequence[Any]) -> tuple[Any, ...]:
    """The operands of a primitive: tensors, and (weak) Python numbers where a tensor is beside them.

    A list of Python floats takes the floating dtype of the tensors beside it, float32 where there is none.
    """
    lists = [k for k, value in enumerate(values) if isinstance(value, (list, tuple))]
    found = [None if k in lists else _as_operand(value) for k, value in enumerate(values)]
    for k in lists:
        found[k] = _read_beside(values[k], found)
    if any(isinstance(operand, Tensor) for operand in found):
        return tuple(found)
    return tuple(asarray(operand) for operand in found)


def together(*values: Any) -> list[Any]:
    """All values as tensors; Python floats take the floating dtype of the tensors and arrays beside them."""
    for value in values:
        if not isinstance(value, Tensor):
            break
    else:
        return list(values)
    weak = [k for k, value in enumerate(values) if value.__class__ is float or isinstance(value, (list, tuple))]
    found = [None if k in weak else asarray(value) for k, value in enumerate(values)]
    for k in weak:
        found[k] = _read_beside(values[k], found)
    return found


def _read_beside(value: Any, others: Sequence[Any]) -> Tensor:
    """A Python float, or lists of numbers, as a tensor beside others."""
    array = read(value)
    if not is_weak(array, value):
        return Tensor(to_array(array))
    dtypes = [other.dtype for other in others if isinstance(other, Tensor)]
    floats = [dtype for dtype in dtypes if dtype.kind == "f"]
    return Tensor(array.astype(np.result_type(np.float32, *(floats or dtypes))))
