"""HIPS autograd: NumPy code differentiated op by op.

The steps of x are a list: the gradient of ``x[t]`` would otherwise be a full array of zeros for every t.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .work import Case, Work, inputs, shape_of, weights, zeros

autograd: Any = importlib.import_module("autograd")
anp: Any = importlib.import_module("autograd.numpy")
LIBRARIES = ("autograd", "autograd.numpy")


def build(work: Work, options: dict[str, Any]) -> Case:
    """A gradient step; forward passes are NumPy's own (see numpy_peer)."""
    w, h0 = weights(work), zeros(work)
    if work.cell == "lstm":
        w = {name: value.T.copy() if value.ndim == 2 else value for name, value in w.items()}
    x, layers = inputs(work), shape_of(work)[4]

    def outputs(w: dict[str, Any], xs: Any) -> Any:
        if work.cell != "lstm":
            return CELLS[work.cell](w, xs, h0)
        for k in range(layers):
            xs = lstm_layer(w, k, xs, h0)
        return xs

    def loss(w: dict[str, Any], xs: Any) -> Any:
        total = 0.0
        for y in outputs(w, xs):
            total = total + anp.sum(y * y)
        return total

    gradient = autograd.value_and_grad(lambda arguments: loss(*arguments))

    def call() -> Any:
        return gradient((w, list(x)))

    def result() -> dict[str, np.ndarray]:
        value, (slopes, dx) = call()
        found = {n: np.asarray(v.T if work.cell == "lstm" and v.ndim == 2 else v) for n, v in slopes.items()}
        return found | {"x": np.stack(dx), "loss": np.asarray(value)}

    return Case(call, result)


def sigmoid(v: Any) -> Any:
    """Through tanh: one transcendental, no overflow."""
    return 0.5 * anp.tanh(0.5 * v) + 0.5


def memory_update(gates: Iterable[Any], c: Any) -> tuple[Any, Any]:
    """The LSTM's new (h, c) from the gates before their nonlinearity."""
    i, f, g, o = gates
    c = sigmoid(f) * c + sigmoid(i) * anp.tanh(g)
    return sigmoid(o) * anp.tanh(c), c


def quarters(z: Any) -> list[Any]:
    """Four slices of the last axis."""
    size = z.shape[-1] // 4
    return [z[:, k * size : (k + 1) * size] for k in range(4)]


def lstm_layer(w: dict[str, Any], k: int, xs: Any, h: Any) -> list[Any]:
    """One layer."""
    c, out = h, []
    for x in xs:
        z = anp.dot(x, w[f"weight_ih_l{k}"]) + anp.dot(h, w[f"weight_hh_l{k}"])
        h, c = memory_update(quarters(z + (w[f"bias_ih_l{k}"] + w[f"bias_hh_l{k}"])), c)
        out.append(h)
    return out


def peephole_norm(w: dict[str, Any], xs: Any, h: Any) -> list[Any]:
    """LSTM with peepholes, each gate layer-normalised."""
    c, out = h, []

    def norm(v: Any, gate: str) -> Any:
        v = v - anp.mean(v, axis=-1, keepdims=True)
        v = v / anp.sqrt(anp.mean(v * v, axis=-1, keepdims=True) + 1e-5)
        return v * w[f"gain_{gate}"] + w[f"shift_{gate}"]

    for x in xs:
        i, f, g, o = quarters(anp.dot(x, w["W"]) + anp.dot(h, w["U"]))
        i, f = sigmoid(norm(i + w["p_i"] * c, "i")), sigmoid(norm(f + w["p_f"] * c, "f"))
        c = f * c + i * anp.tanh(norm(g, "g"))
        h = sigmoid(norm(o + w["p_o"] * c, "o")) * anp.tanh(c)
        out.append(h)
    return out


def minimal_gated(w: dict[str, Any], xs: Any, h: Any) -> list[Any]:
    """Minimal gated unit (Zhou et al. 2016)."""
    out, size = [], h.shape[1]
    for x in xs:
        z = anp.dot(x, w["W"]) + w["b"]
        f = sigmoid(z[:, :size] + anp.dot(h, w["U_f"]))
        h = h + f * (anp.tanh(z[:, size:] + anp.dot(f * h, w["U_g"])) - h)
        out.append(h)
    return out


def multiplicative(w: dict[str, Any], xs: Any, h: Any) -> list[Any]:
    """Multiplicative LSTM (Krause et al. 2016)."""
    c, out = h, []
    for x in xs:
        m = anp.dot(x, w["W_m"]) * anp.dot(h, w["U_m"])
        h, c = memory_update(quarters(anp.dot(x, w["W"]) + anp.dot(m, w["V"]) + w["b"]), c)
        out.append(h)
    return out


def eight_matmuls(w: dict[str, Any], xs: Any, h: Any) -> list[Any]:
    """An LSTM as it stands in a textbook."""
    c, out = h, []
    for x in xs:
        h, c = memory_update((anp.dot(x, w[f"W_{k}"]) + anp.dot(h, w[f"U_{k}"]) + w[f"b_{k}"] for k in "ifgo"), c)
        out.append(h)
    return out


CELLS: dict[str, Callable[[dict[str, Any], Any, Any], list[Any]]] = {
    "peephole-norm": peephole_norm,
    "minimal-gated": minimal_gated,
    "multiplicative": multiplicative,
    "eight-matmuls": eight_matmuls,
}
