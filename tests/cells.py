"""Random loop bodies: what the passes and the scan are tried on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import ops

B, H, X = 3, 4, 2
Body = Callable[[Any, Any], tuple[Any, Any]]

UNARY: dict[str, Callable[[Any], Any]] = {
    "tanh": ops.tanh,
    "sigmoid": ops.sigmoid,
    "softplus": ops.softplus,
    "square": lambda v: 0.3 * ops.square(v),
    "sin": ops.sin,
    "softmax": ops.softmax,
    "norm": lambda v: v / (1.0 + ops.norm(v, axis=-1, keepdims=True)),
    "layer_norm": lambda v: (v - v.mean(axis=-1, keepdims=True)) / ops.sqrt(v.var(axis=-1, keepdims=True) + 0.5),
    "batch_mean": lambda v: v - v.mean(axis=0),
    "flip": lambda v: ops.flip(v, -1),
    "halves": lambda v: ops.concatenate(ops.chunk(v, 2)[::-1], axis=-1),
    "relu_gate": lambda v: ops.where(ops.greater(v, 0.1), v, 0.2 * v),
    "pick": lambda v: ops.concatenate([v[:, 1:], v[:, :1] * 2.0], axis=-1),
    "row_max": lambda v: v * 0.5 + 0.1 * ops.max(v, axis=-1, keepdims=True),
    "scale": lambda v: v * 0.7 - 0.1,
    "transposed": lambda v: (v.T * 0.9).T,
    "reshaped": lambda v: ops.reshape(ops.reshape(v, (B, 2, H // 2)) * 1.1, (B, H)),
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": ops.add,
    "subtract": ops.subtract,
    "multiply": ops.multiply,
    "maximum": ops.maximum,
    "divide": lambda a, b: a / (1.5 + ops.square(b)),
    "blend": lambda a, b: ops.sigmoid(a) * b + (1.0 - ops.sigmoid(a)) * a,
}


@st.composite
def recipes(draw: Any) -> list[tuple[str, str, int, int]]:
    """A list of steps (kind, name, operand, operand); operands count back from the newest value."""
    steps = []
    for _ in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(["unary", "binary", "matmul", "capture"]))
        names = {"unary": sorted(UNARY), "binary": sorted(BINARY), "matmul": ["U0", "U1"], "capture": ["bias", "row"]}
        steps.append((kind, draw(st.sampled_from(names[kind])), draw(st.integers(1, 5)), draw(st.integers(1, 5))))
    return steps


def tensors(seed: int, steps: int) -> dict[str, Any]:
    """Float64 inputs, captures and initial states, all of which require gradients."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (steps, B, X), "h": (B, H), "c": (B, H), "W": (X, H), "U0": (H, H), "U1": (H, H),
        "bias": (H,), "row": (B, 1),
    }  # fmt: skip
    return {name: tg.tensor(0.6 * rng.standard_normal(shape), requires_grad=True) for name, shape in shapes.items()}


def body_of(recipe: list[tuple[str, str, int, int]], t: dict[str, Any]) -> Body:
    """The recipe as a body over a carry (h, c) that closes over the captures."""

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        h, c = carry
        values = [c, h, x @ t["W"]]
        for kind, name, i, j in recipe:
            a, b = values[-min(i, len(values))], values[-min(j, len(values))]
            if kind == "unary":
                values.append(UNARY[name](a))
            elif kind == "binary":
                values.append(BINARY[name](a, b))
            elif kind == "matmul":
                values.append(a @ t[name])
            else:
                values.append(a * t[name])
        new_h = ops.tanh(values[-1] + 0.5 * h)
        new_c = 0.5 * c + ops.tanh(values[-2])
        return (new_h, new_c), {"h": new_h, "last": values[-1], "mean": values[-3].mean(axis=-1)}

    return body


def run(body: Body, t: dict[str, Any], **options: Any) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Values of a scan over the body, and gradients of a scalar function of all of them."""
    (h, c), ys = ops.scan(body, (t["h"], t["c"]), t["x"], **options)
    loss = (ops.sin(ys["h"]) * 1.3).sum() + ops.square(ys["last"]).sum() + ys["mean"].sum() + (h * c).sum()
    for leaf in t.values():
        leaf.zero_grad()
    loss.backward()
    values = [h.numpy(), c.numpy(), *(ys[key].numpy() for key in sorted(ys))]
    return values, {name: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad for name, leaf in t.items()}
