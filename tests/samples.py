"""Sample inputs for every primitive of the registry.

``SAMPLES[name]`` lists inputs for the checks of derivatives: float64, away from kinks and ties.
``ZERO_SIZE[name]`` and ``ZERO_D[name]`` list inputs without elements, and with 0-d arrays.  A primitive
for which 0-d arrays make no sense is named in ``NO_ZERO_D`` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import tinygrad_lstm as tg
import tinygrad_lstm.ops.loop
from tinygrad_lstm import nn, ops
from tinygrad_lstm.tree import flatten


class Sample(NamedTuple):
    """Operands and parameters of one application; ``call`` where it is made through a public function."""

    args: tuple[Any, ...]
    params: dict[str, Any]
    call: Callable[..., Any] | None = None

    def function(self, name: str) -> Callable[..., Any]:
        """The application as a function of its operands."""
        if self.call is not None:
            return self.call
        return lambda *args: tg.REGISTRY[name].bind(args, dict(self.params))

    def squared(self, name: str) -> Callable[..., Any]:
        """The floating outputs, squared: a linear primitive has second derivatives then."""
        function = self.function(name)
        return lambda *args: [t * t for t in flatten(function(*args))[0] if t.dtype.kind == "f"]

    def floats(self) -> list[int]:
        """Positions of the operands that have a gradient."""
        return [k for k, a in enumerate(self.args) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]


def sample(*args: Any, call: Callable[..., Any] | None = None, **params: Any) -> Sample:
    return Sample(args, params, call)


def spread(shape: tuple[int, ...], low: float = -1.9, high: float = 1.7, seed: int = 0) -> np.ndarray:
    """Distinct numbers in (low, high) in a shuffled order; no two closer than a step, none at 0."""
    n = int(np.prod(shape, dtype=int))
    values = low + (high - low) * (np.arange(n) + 0.37) / max(n, 1)
    values = np.where(np.abs(values) < 0.02, 0.02, values)
    return np.random.default_rng(seed + n).permutation(values).reshape(shape)


def ints(values: Any) -> np.ndarray:
    return np.asarray(values, np.int64)


# ---------------------------------------------------------------------------- elementwise, by domain

DOMAINS: dict[str, tuple[float, float]] = {
    "abs": (-2, 2), "arccos": (-0.9, 0.9), "arccosh": (1.2, 4), "arcsin": (-0.9, 0.9), "arcsinh": (-3, 3),
    "arctan": (-3, 3), "arctanh": (-0.9, 0.9), "cos": (-4, 4), "cosh": (-2, 2), "erf": (-2, 2), "exp": (-2, 2),
    "exp2": (-2, 2), "expm1": (-2, 2), "gelu": (-3, 3), "isfinite": (-2, 2), "isinf": (-2, 2), "isnan": (-2, 2),
    "log": (0.2, 4), "log1p": (-0.6, 3),
    "log2": (0.2, 4), "logical_not": (-2, 2), "negative": (-2, 2), "relu": (-2, 2), "sigmoid": (-4, 4),
    "sign": (-2, 2), "silu": (-4, 4), "sin": (-4, 4), "sinh": (-2, 2), "softplus": (-4, 4), "sqrt": (0.3, 4),
    "square": (-2, 2), "tan": (-1.2, 1.2), "tanh": (-2, 2),
}  # fmt: skip
WITH_PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "clip": [{"a_min": -0.51, "a_max": 0.73}, {"a_min": -float("inf"), "a_max": 0.11}],
    "elu": [{"alpha": 1.0}, {"alpha": 0.3}],
    "leaky_relu": [{"negative_slope": 0.01}, {"negative_slope": 0.4}],
}
BINARY: dict[str, tuple[float, float]] = {
    "add": (-2, 2), "arctan2": (-2, 2), "at_least": (-2, 2), "at_most": (-2, 2),
    "divide": (0.4, 2), "equal": (-2, 2), "greater": (-2, 2),
    "greater_equal": (-2, 2), "less": (-2, 2), "less_equal": (-2, 2), "logical_and": (-2, 2), "logical_or": (-2, 2),
    "maximum": (-2, 2), "minimum": (-2, 2), "multiply": (-2, 2), "not_equal": (-2, 2), "power": (0.3, 2.2),
    "subtract": (-2, 2),
}  # fmt: skip

SAMPLES: dict[str, list[Sample]] = {}
ZERO_SIZE: dict[str, list[Sample]] = {}
ZERO_D: dict[str, list[Sample]] = {}
NO_ZERO_D: dict[str, str] = {
    "argmax": "takes an axis", "argmin": "takes an axis", "concatenate": "joins along an axis",
    "cumsum": "runs along an axis", "log_softmax": "normalises an axis", "matmul": "contracts axes",
    "prod": "reduces the last axis", "roll": "moves along an axis", "scan": "runs along axis 0",
    "softmax": "normalises an axis",
    "scatter_add": "adds along axis 0", "split": "cuts an axis", "take": "reads along an axis",
    "take_along_axis": "reads along an axis", "untake_along_axis": "adds along an axis",
}  # fmt: skip

for _name, (_low, _high) in DOMAINS.items():
    SAMPLES[_name] = [sample(spread((3, 4), _low, _high)), sample(spread((5,), _low, _high, 1))]
    ZERO_SIZE[_name] = [sample(np.zeros((0, 3)))]
    ZERO_D[_name] = [sample(spread((), _low, _high))]
for _name, _list in WITH_PARAMETERS.items():
    SAMPLES[_name] = [sample(spread((3, 4)), **p) for p in _list]
    ZERO_SIZE[_name] = [sample(np.zeros((0, 3)), **_list[0])]
    ZERO_D[_name] = [sample(spread(()), **_list[0])]
for _name, (_low, _high) in BINARY.items():
    SAMPLES[_name] = [
        sample(spread((3, 4), _low, _high), spread((3, 4), _low, _high + 0.1, 1)),
        sample(spread((2, 1, 4), _low, _high), spread((3, 1), _low, _high + 0.1, 1)),
        sample(spread((4,), _low, _high), 0.77),
        sample(1.3, spread((4,), _low, _high)),
    ]
    ZERO_SIZE[_name] = [sample(np.zeros((0, 3)), np.ones((1, 3)))]
    ZERO_D[_name] = [sample(spread((), _low, _high), spread((), _low, _high + 0.1))]
_dividends, _divisors = spread((3, 4), -4, 4), spread((3, 4), 0.6, 1.9, 1)
for _name in ("remainder", "floor_divide"):  # away from multiples, where they jump
    SAMPLES[_name] = [
        sample(_dividends, _divisors),
        sample(_dividends, -_divisors[:, :1]),
        sample(_dividends, 0.77),
        sample(-5.3, _divisors[0]),
    ]
    ZERO_SIZE[_name] = [sample(np.zeros((0, 3)), np.ones((1, 3)))]
    ZERO_D[_name] = [sample(spread((), -4, 4), spread((), 0.6, 1.9))]
SAMPLES["power"] += [
    sample(spread((4,), -2, 2), call=lambda x, p=p: ops.power(x, p)) for p in (-2.0, 1.0, 2.0, 3.0, 0, 1, 2, 3)
]

for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    SAMPLES[_name] = [sample(ints([[12, -5, 3]]), ints([[10], [6]])), sample(ints([1, 2]), np.array([True, False]))]
    ZERO_SIZE[_name] = [sample(ints(np.zeros((0, 3))), ints([[1, 2, 3]]))]
    ZERO_D[_name] = [sample(ints(6), ints(3))]
SAMPLES["invert"] = [sample(ints([[12, -5, 3]])), sample(np.array([True, False]))]
ZERO_SIZE["invert"], ZERO_D["invert"] = [sample(ints(np.zeros((0, 3))))], [sample(ints(6))]

_mask = np.array([[True, False, True, False]] * 3)
SAMPLES["where"] = [
    sample(_mask, spread((3, 4)), spread((3, 4), seed=1)),
    sample(_mask[0], spread((3, 1)), spread((), seed=1)),
    sample(_mask, spread((3, 4)), 0.0),
    sample(_mask, 1.0, spread((4,))),
]
ZERO_SIZE["where"] = [sample(np.zeros((0, 4), bool), np.zeros((0, 4)), np.zeros((1, 4)))]
ZERO_D["where"] = [sample(np.array(True), spread(()), spread((), seed=1))]

# ---------------------------------------------------------------------------- reductions and normalisations

for _name in ("sum", "max", "min", "norm", "logsumexp", "all", "any"):
    SAMPLES[_name] = [
        sample(spread((3, 4)), axis=(-2, -1), keepdims=False),
        sample(spread((3, 4)), axis=(-1,), keepdims=True),
        sample(spread((2, 3, 4)), axis=(-3, -1), keepdims=False),
        sample(spread((5,)), axis=(), keepdims=False),
    ]
    ZERO_SIZE[_name] = [sample(np.zeros((0, 3)), axis=(-1,), keepdims=False)]
    ZERO_D[_name] = [sample(spread(()), axis=(), keepdims=False)]
ZERO_SIZE["sum"] += [
    sample(np.zeros((0, 3)), axis=(-2,), keepdims=False),
    sample(np.zeros((0, 3)), axis=(-2, -1), keepdims=True),
]
for _name in ("argmax", "argmin"):
    SAMPLES[_name] = [sample(spread((3, 4)), axis=-1, keepdims=False), sample(spread((3, 4)), axis=-2, keepdims=True)]
    ZERO_SIZE[_name] = [sample(np.zeros((0, 3)), axis=-1, keepdims=False)]
for _name in ("softmax", "log_softmax"):
    SAMPLES[_name] = [sample(spread((3, 4)), axis=-1), sample(spread((3, 4)), axis=-2)]
    ZERO_SIZE[_name] = [sample(np.zeros((0, 3)), axis=-1), sample(np.zeros((0, 3)), axis=-2)]
SAMPLES["cumsum"] = [sample(spread((3, 4)), axis=-1), sample(spread((3, 4)), axis=-2)]
ZERO_SIZE["cumsum"] = [sample(np.zeros((0, 3)), axis=-1), sample(np.zeros((0, 3)), axis=-2)]
_one_zero, _two_zeros = np.array([[1.5, 0.0, -0.7, 2.0]]), np.array([[1.5, 0.0, -0.7, 0.0]])
SAMPLES["prod"] = [sample(spread((3, 4))), sample(_one_zero), sample(_two_zeros), sample(spread((2, 1)))]
ZERO_SIZE["prod"] = [sample(np.zeros((0, 3)))]

# ---------------------------------------------------------------------------- products

SAMPLES["matmul"] = [
    sample(spread((3, 4)), spread((4, 2))),
    sample(spread((2, 3, 4)), spread((4, 2))),
    sample(spread((2, 1, 3, 4)), spread((5, 4, 2))),
    sample(spread((3, 4)), spread((2, 4, 2))),
]
ZERO_SIZE["matmul"] = [
    sample(np.zeros((0, 4)), spread((4, 2))),
    sample(np.zeros((3, 0)), np.zeros((0, 2))),
    sample(np.zeros((2, 3, 0)), np.zeros((0, 2))),
    sample(np.zeros((0, 3, 4)), spread((4, 2))),
    sample(np.zeros((2, 0, 4)), spread((4, 2))),
]
SAMPLES["einsum"] = [
    sample(spread((3, 4)), spread((4, 2)), subscripts="ij,jk->ik"),
    sample(spread((3, 4)), subscripts="ij->i"),
    sample(spread((3, 4)), spread((4, 2)), spread((3,)), subscripts="ij,jk,i->"),
    sample(spread((2, 3, 4)), spread((2, 4, 5)), subscripts="bij,bjk->kib"),
    sample(spread((3,)), spread((4,)), subscripts="i,j->ji"),
]
ZERO_SIZE["einsum"] = [sample(np.zeros((0, 4)), spread((4, 2)), subscripts="ij,jk->ik"),
                       sample(np.zeros((3, 0)), np.zeros((0, 2)), subscripts="ij,jk->ik")]  # fmt: skip
ZERO_D["einsum"] = [sample(spread(()), spread((), seed=1), subscripts=",->")]

# ---------------------------------------------------------------------------- shapes

SAMPLES["reshape"] = [
    sample(spread((3, 4)), shape=(2, 6)),
    sample(spread((3, 4)), shape=(12,)),
    sample(spread((1,)), shape=()),
]
ZERO_SIZE["reshape"] = [sample(np.zeros((0, 3)), shape=(3, 0))]
ZERO_D["reshape"] = [sample(spread(()), shape=(1, 1))]
SAMPLES["broadcast_to"] = [sample(spread((3, 1)), shape=(2, 3, 4)), sample(spread((4,)), shape=(4,))]
ZERO_SIZE["broadcast_to"] = [sample(spread((3, 1)), shape=(3, 0)), sample(np.zeros((0,)), shape=(2, 0))]
ZERO_D["broadcast_to"] = [sample(spread(()), shape=(2, 3))]
SAMPLES["sum_to"] = [
    sample(spread((2, 3, 4)), shape=(3, 1)),
    sample(spread((2, 3)), shape=()),
    sample(spread((4,)), shape=(4,)),
]
ZERO_SIZE["sum_to"] = [sample(np.zeros((3, 0)), shape=(3, 1)), sample(np.zeros((2, 0)), shape=(0,))]
ZERO_D["sum_to"] = [sample(spread(()), shape=())]
SAMPLES["transpose"] = [sample(spread((3, 4)), axes=(-1, -2)), sample(spread((2, 3, 4)), axes=(-1, -3, -2))]
ZERO_SIZE["transpose"] = [sample(np.zeros((0, 3)), axes=(-1, -2))]
ZERO_D["transpose"] = [sample(spread(()), axes=())]
SAMPLES["concatenate"] = [
    sample(spread((3, 4)), spread((2, 4), seed=1), axis=-2),
    sample(spread((3, 1)), spread((3, 2), seed=1), spread((3, 1), seed=2), axis=-1),
]
ZERO_SIZE["concatenate"] = [
    sample(np.zeros((0, 4)), spread((2, 4)), axis=-2),
    sample(np.zeros((0, 2)), np.zeros((0, 1)), axis=-1),
]
SAMPLES["split"] = [sample(spread((6, 2)), sizes=(2, 3, 1), axis=-2), sample(spread((2, 4)), sizes=(2, 2), axis=-1)]
ZERO_SIZE["split"] = [sample(spread((2, 2)), sizes=(0, 2), axis=-2), sample(np.zeros((0, 4)), sizes=(1, 3), axis=-1)]
SAMPLES["flip"] = [sample(spread((3, 4)), axis=(-1,)), sample(spread((3, 4)), axis=(-2, -1))]
ZERO_SIZE["flip"] = [sample(np.zeros((0, 3)), axis=(-2,))]
ZERO_D["flip"] = [sample(spread(()), axis=())]
SAMPLES["roll"] = [sample(spread((3, 4)), shift=(1,), axis=(-1,)), sample(spread((3, 4)), shift=(-2, 5), axis=(-2, -1))]
ZERO_SIZE["roll"] = [sample(np.zeros((0, 3)), shift=(1,), axis=(-2,))]
SAMPLES["astype"] = [
    sample(spread((3, 4)), dtype=np.dtype(np.float64)),
    sample(np.array([0.5, -1.25, 3.0]), dtype=np.dtype(np.float32)),
]
ZERO_SIZE["astype"] = [sample(np.zeros((0, 3)), dtype=np.dtype(np.float32))]
ZERO_D["astype"] = [sample(np.array(0.5), dtype=np.dtype(np.float32))]
SAMPLES["full"] = [sample(shape=(2, 3), dtype=np.dtype(np.float32), value=0)]
ZERO_SIZE["full"] = [sample(shape=(0, 3), dtype=np.dtype(np.float64), value=1.5)]
ZERO_D["full"] = [sample(shape=(), dtype=np.dtype(np.float64), value=1.5)]
for _name in ("alias", "stop_gradient", "stop_nan"):
    SAMPLES[_name] = [sample(spread((3, 4)))]
    ZERO_SIZE[_name] = [sample(np.zeros((0, 3)))]
    ZERO_D[_name] = [sample(spread(()))]

# ---------------------------------------------------------------------------- indexing

_rows = ("slice", 1, None, 2)
SAMPLES["getitem"] = [
    sample(spread((5, 4)), template=(_rows,)),
    sample(spread((5, 4)), template=(2, None, ("slice", None, None, -1))),
    sample(spread((5, 4)), ints([0, 3, 0]), template=(("array",), Ellipsis)),
    sample(spread((5, 4)), ints([[0], [3]]), ints([1, -1]), template=(("array",), ("array",))),
    sample(spread((5, 4)), np.array([True, False, True, True, False]), template=(("array",),)),
]
ZERO_SIZE["getitem"] = [
    sample(np.zeros((0, 4)), template=(("slice", 1, None, None),)),
    sample(spread((5,)), ints([]), template=(("array",),)),
]
ZERO_D["getitem"] = [sample(spread(()), template=()), sample(spread(()), template=(None, Ellipsis))]
SAMPLES["put"] = [
    sample(spread((2, 4)), template=(_rows,), shape=(5, 4)),
    sample(spread((3, 4)), ints([0, 3, 0]), template=(("array",), Ellipsis), shape=(5, 4)),
]
ZERO_SIZE["put"] = [sample(np.zeros((0, 4)), template=(("slice", 5, None, None),), shape=(5, 4))]
ZERO_D["put"] = [sample(spread(()), template=(2,), shape=(4,)), sample(spread(()), template=(), shape=())]
SAMPLES["take"] = [
    sample(spread((5, 4)), ints([[0, 2], [4, 2]]), axis=-2),
    sample(spread((5, 4)), ints([-1, 0, 0]), axis=-1),
    sample(spread((2, 3, 2)), ints(1), axis=-2),
]
ZERO_SIZE["take"] = [sample(spread((5, 4)), ints([]), axis=-2), sample(np.zeros((5, 0)), ints([1]), axis=-2)]
SAMPLES["untake"] = [
    sample(spread((2, 2, 4)), ints([[0, 2], [4, 2]]), shape=(5, 4), axis=-2),
    sample(spread((5, 3)), ints([-1, 0, 0]), shape=(5, 4), axis=-1),
]
ZERO_SIZE["untake"] = [sample(np.zeros((0, 4)), ints([]), shape=(5, 4), axis=-2)]
ZERO_D["untake"] = [sample(spread(()), ints(1), shape=(3,), axis=-1)]
SAMPLES["take_along_axis"] = [
    sample(spread((3, 4)), ints([[0, 0], [3, 1], [-1, 2]]), axis=-1),
    sample(spread((3, 4)), ints([[0, 1, 2, 0]]), axis=-2),
]
ZERO_SIZE["take_along_axis"] = [sample(spread((3, 4)), np.zeros((3, 0), int), axis=-1)]
SAMPLES["untake_along_axis"] = [sample(spread((3, 2)), ints([[0, 0], [3, 1], [-1, 2]]), shape=(3, 4), axis=-1)]
ZERO_SIZE["untake_along_axis"] = [sample(np.zeros((3, 0)), np.zeros((3, 0), int), shape=(3, 4), axis=-1)]
SAMPLES["scatter_add"] = [
    sample(spread((4, 2)), ints([0, 3, 0]), spread((3, 2), seed=1)),
    sample(spread((4,)), ints([[1, 1], [-1, 0]]), spread((2, 2), seed=1)),
    sample(spread((4, 2)), ints([2]), spread((), seed=1)),
]
ZERO_SIZE["scatter_add"] = [
    sample(spread((4, 2)), ints([]), np.zeros((0, 2))),
    sample(np.zeros((4, 0)), ints([1]), np.zeros((1, 0))),
]
SAMPLES["one_hot"] = [sample(ints([[0, 2], [1, 1]]), n=3, dtype=np.dtype(np.float32))]
ZERO_SIZE["one_hot"] = [sample(ints([]), n=3, dtype=np.dtype(np.float32))]
ZERO_D["one_hot"] = [sample(ints(2), n=3, dtype=np.dtype(np.float32))]

# ---------------------------------------------------------------------------- functions of functions


def _recomputed(x: Any, y: Any) -> Any:
    return ops.tanh(x * y) + ops.exp(y)


_checkpointed = tg.checkpoint(_recomputed)
SAMPLES["checkpoint"] = [
    sample(spread((3, 4)), spread((4,)), call=_checkpointed),
    sample(spread((3, 4)), spread((4,)), call=tg.checkpoint(lambda x, y: (x * y, ops.sin(x)))),
]
ZERO_SIZE["checkpoint"] = [sample(np.zeros((0, 4)), spread((4,)), call=_checkpointed)]
ZERO_D["checkpoint"] = [sample(spread(()), spread((), seed=1), call=_checkpointed)]


def _cell(w: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    def body(h: Any, x: Any) -> tuple[Any, Any]:
        h = ops.tanh(ops.matmul(h, w) + x)
        return h, h * 2.0

    return body


SAMPLES["scan"] = [
    sample(spread((2, 3)), spread((4, 2, 3)), spread((3, 3)), call=lambda h, xs, w: ops.scan(_cell(w), h, xs)),
    sample(
        spread((2, 3)), spread((4, 2, 3)), spread((3, 3)),
        call=lambda h, xs, w: ops.scan(_cell(w), h, xs, reverse=True, lengths=[3, 0]),
    ),
]  # fmt: skip
ZERO_SIZE["scan"] = [
    sample(np.zeros((0, 3)), np.zeros((4, 0, 3)), spread((3, 3)), call=lambda h, xs, w: ops.scan(_cell(w), h, xs)),
    sample(spread((2, 3)), np.zeros((0, 2, 3)), spread((3, 3)), call=lambda h, xs, w: ops.scan(_cell(w), h, xs)),
]

_compiled = tg.compile(_recomputed)
SAMPLES["compiled"] = [
    sample(spread((3, 4)), spread((4,)), call=_compiled),
    sample(spread((3, 4)), spread((4,)), call=tg.compile(lambda x, y: (x * y, ops.sin(x)))),
]
ZERO_SIZE["compiled"] = [sample(np.zeros((0, 4)), spread((4,)), call=_compiled)]
ZERO_D["compiled"] = [sample(spread(()), spread((), seed=1), call=_compiled)]

# ---------------------------------------------------------------------------- losses

assert nn  # its primitives are enrolled too
_loss = {"ignore_index": -100, "smoothing": 0.1}
SAMPLES["cross_entropy"] = [
    sample(spread((2, 3, 4)), ints([[0, 3, -100], [1, 2, 0]]), reduction=how, **_loss)
    for how in ("mean", "sum", "none")
]
ZERO_SIZE["cross_entropy"] = [sample(np.zeros((0, 4)), ints([]), reduction="mean", **_loss)]
SAMPLES["cross_entropy_slope"] = [
    sample(spread(()), spread((2, 4)), ints([0, 3]), reduction="mean", **_loss),
    sample(spread((3,)), spread((3, 4)), ints([0, -100, 3]), reduction="none", **_loss),
]
ZERO_SIZE["cross_entropy_slope"] = [sample(np.zeros(()), np.zeros((0, 4)), ints([]), reduction="mean", **_loss)]
SAMPLES["binary_cross_entropy"] = [sample(spread((2, 3), 0.1, 0.9), spread((2, 3), 0.2, 0.8, seed=1))]
ZERO_SIZE["binary_cross_entropy"] = [sample(np.zeros((0, 3)), np.zeros((0, 3)))]
ZERO_D["binary_cross_entropy"] = [sample(np.asarray(0.3), np.asarray(0.6))]
NO_ZERO_D.update({"cross_entropy": "classes on an axis", "cross_entropy_slope": "classes on an axis"})
