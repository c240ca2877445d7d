"""The table of leaves: every scalar function that an expression can contain, defined once.

A row says what the leaf is called, how many arguments it takes, which NumPy callable computes it (the
reference), and how native code gets it: for the dtypes in ``vector``, :mod:`.lowering` has a rule of the
same name that writes LLVM instructions for any number of lanes; for the others, ``libm`` is the scalar
function of the mathematics library that is called lane by lane.

The meaning of every leaf is NumPy's: ``maximum`` and ``minimum`` propagate NaN, ``sign(NaN)`` is NaN,
comparisons with NaN are false except ``not_equal``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import special

__all__ = ["LEAVES", "Leaf"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One scalar function.

    ``kind`` says how operand dtypes combine in native code: ``arithmetic`` and ``float`` compute in the
    dtype of the result, ``compare`` in the common dtype of the arguments, ``logic`` in bool, ``select`` is
    ``where``.  ``vector`` lists the dtypes for which :mod:`.lowering` has a branch-free form.
    """

    name: str
    arity: int
    numpy: Callable[..., Any]
    kind: str
    libm: str = ""
    vector: tuple[str, ...] = ("float32", "float64")

    @property
    def transcendental(self) -> bool:
        """Whether the leaf costs tens of instructions rather than one."""
        return self.kind == "float" and self.name not in {"sqrt"}


_F32 = ("float32",)
_NONE: tuple[str, ...] = ()

_ROWS = (
    # arithmetic: one or a few instructions
    Leaf("add", 2, np.add, "arithmetic"),
    Leaf("subtract", 2, np.subtract, "arithmetic"),
    Leaf("multiply", 2, np.multiply, "arithmetic"),
    Leaf("divide", 2, np.divide, "arithmetic"),
    Leaf("remainder", 2, np.remainder, "arithmetic"),
    Leaf("floor_divide", 2, np.floor_divide, "arithmetic"),
    Leaf("negative", 1, np.negative, "arithmetic"),
    Leaf("reciprocal", 1, np.reciprocal, "arithmetic"),
    Leaf("square", 1, np.square, "arithmetic"),
    Leaf("absolute", 1, np.absolute, "arithmetic"),
    Leaf("sign", 1, np.sign, "arithmetic"),
    Leaf("maximum", 2, np.maximum, "arithmetic"),
    Leaf("minimum", 2, np.minimum, "arithmetic"),
    Leaf("sqrt", 1, np.sqrt, "float"),
    # comparisons and logic: bool results
    Leaf("equal", 2, np.equal, "compare"),
    Leaf("not_equal", 2, np.not_equal, "compare"),
    Leaf("less", 2, np.less, "compare"),
    Leaf("less_equal", 2, np.less_equal, "compare"),
    Leaf("greater", 2, np.greater, "compare"),
    Leaf("greater_equal", 2, np.greater_equal, "compare"),
    Leaf("isfinite", 1, np.isfinite, "compare"),
    Leaf("logical_and", 2, np.logical_and, "logic"),
    Leaf("logical_or", 2, np.logical_or, "logic"),
    Leaf("logical_not", 1, np.logical_not, "logic"),
    Leaf("where", 3, np.where, "select"),
    # transcendental
    Leaf("exp", 1, np.exp, "float", "exp", _F32),
    Leaf("expm1", 1, np.expm1, "float", "expm1", _F32),
    Leaf("exp2", 1, np.exp2, "float", "exp2", _F32),
    Leaf("log", 1, np.log, "float", "log", _F32),
    Leaf("log1p", 1, np.log1p, "float", "log1p", _F32),
    Leaf("log2", 1, np.log2, "float", "log2", _F32),
    Leaf("sin", 1, np.sin, "float", "sin", _NONE),
    Leaf("cos", 1, np.cos, "float", "cos", _NONE),
    Leaf("tan", 1, np.tan, "float", "tan", _NONE),
    Leaf("arcsin", 1, np.arcsin, "float", "asin", _NONE),
    Leaf("arccos", 1, np.arccos, "float", "acos", _NONE),
    Leaf("arctan", 1, np.arctan, "float", "atan", _NONE),
    Leaf("arctan2", 2, np.arctan2, "float", "atan2", _NONE),
    Leaf("sinh", 1, np.sinh, "float", "sinh", _NONE),
    Leaf("cosh", 1, np.cosh, "float", "cosh", _NONE),
    Leaf("tanh", 1, np.tanh, "float", "tanh", _F32),
    Leaf("arcsinh", 1, np.arcsinh, "float", "asinh", _NONE),
    Leaf("arccosh", 1, np.arccosh, "float", "acosh", _NONE),
    Leaf("arctanh", 1, np.arctanh, "float", "atanh", _NONE),
    Leaf("erf", 1, special.erf, "float", "erf", _F32),
    Leaf("sigmoid", 1, special.sigmoid, "float"),
    Leaf("softplus", 1, special.softplus, "float"),
    Leaf("power", 2, np.power, "float", "pow", _NONE),
)

LEAVES: dict[str, Leaf] = {leaf.name: leaf for leaf in _ROWS}
