"""Constants that rules make while a program is derived become equations: a Program holds no arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.errors import GraphError
from tinygrad_lstm.primitive import REGISTRY
from tinygrad_lstm.program import Equation, Program
from tinygrad_lstm.tensor import Tensor

__all__ = ["fill"]


def fill(program: Program, constants: Sequence[Tensor]) -> Program:
    """Replace the last captures, whose values are given, by equations that make them (one value each)."""
    made, slots = [], program.captures[len(program.captures) - len(constants) :]
    for t, slot in zip(constants, slots, strict=True):
        values = np.unique(t._data)
        if values.size != 1:
            raise GraphError(f"a pass met a constant array of shape {t.shape}; such arrays are captures, not constants")
        params: dict[str, Any] = {"shape": t.shape, "dtype": t.dtype, "value": values[0].item()}
        made.append(Equation(REGISTRY["full"], (), params, (slot,)))
    return program.replaced(
        captures=program.captures[: len(program.captures) - len(constants)], equations=(*made, *program.equations)
    )
