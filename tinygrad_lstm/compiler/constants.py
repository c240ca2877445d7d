"""Constants that rules make while a program is derived become equations: a Program holds no arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.primitive import REGISTRY
from tinygrad_lstm.program import Equation, Program
from tinygrad_lstm.tensor import Tensor

__all__ = ["fill"]


def fill(program: Program, constants: Sequence[Tensor]) -> Program:
    """Replace the last captures, whose values are given, by equations that make them."""
    made, slots = [], program.captures[len(program.captures) - len(constants) :]
    for t, slot in zip(constants, slots, strict=True):
        # Nearly always one value everywhere; a user's own rule may name any array.
        same = t.size > 0 and bool((t._data == t._data.flat[0]).all())
        value = t._data.flat[0].item() if same else np.array(t._data)
        params: dict[str, Any] = {"shape": t.shape, "dtype": t.dtype, "value": value}
        made.append(Equation(REGISTRY["full"], (), params, (slot,)))
    return program.replaced(
        captures=program.captures[: len(program.captures) - len(constants)], equations=(*made, *program.equations)
    )
