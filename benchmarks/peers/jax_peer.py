"""jax: ``jit`` of a ``lax.scan``, x and h concatenated in the body, or the input's product hoisted out of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .work import Case, Work, inputs, shape_of, weights, zeros

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")
LIBRARIES = ("jax", "jax.numpy")
Step = Callable[[Any, Any], tuple[Any, Any]]


def build(work: Work, options: dict[str, Any]) -> Case:
    """``options``: ``hoist`` (bool) and ``unroll`` (of the scan)."""
    raw = weights(work)
    # The layout that suits the product, arranged once, outside of what is timed.
    w = {name: jnp.asarray(value.T if name.startswith("weight") else value) for name, value in raw.items()}
    if work.cell == "lstm":  # one bias is enough; both have the same gradient
        for k in range(shape_of(work)[4]):
            w[f"bias_ih_l{k}"] = w[f"bias_ih_l{k}"] + w.pop(f"bias_hh_l{k}")
    x, h0 = jnp.asarray(inputs(work)), jnp.asarray(zeros(work))
    hoist, unroll = bool(options["hoist"]), int(options.get("unroll", 1))

    def run(w: dict[str, Any], x: Any) -> Any:
        if work.cell == "lstm":
            for k in range(shape_of(work)[4]):
                layer = {name[:-3]: value for name, value in w.items() if name.endswith(f"_l{k}")}
                xs, step = lstm(layer, x, hoist)
                x = jax.lax.scan(step, (h0, h0), xs, unroll=unroll)[1]
            return x
        xs, step = CELLS[work.cell](w, x, hoist)
        start = h0 if work.cell == "minimal-gated" else (h0, h0)
        return jax.lax.scan(step, start, xs, unroll=unroll)[1]

    def loss(w: dict[str, Any], x: Any) -> Any:
        y = run(w, x)
        return (y * y).sum()

    compiled = jax.jit(run if work.kind == "forward" else jax.value_and_grad(loss, argnums=(0, 1)))

    def call() -> Any:
        return jax.block_until_ready(compiled(w, x))

    def result() -> dict[str, np.ndarray]:
        if work.kind == "forward":
            return {"y": np.asarray(call())}
        value, (slopes, dx) = call()
        found = {name: np.asarray(slope.T if name.startswith("weight") else slope) for name, slope in slopes.items()}
        found |= {name.replace("bias_ih", "bias_hh"): found[name] for name in list(found) if "bias_ih" in name}
        return found | {"x": np.asarray(dx), "loss": np.asarray(value)}

    return Case(call, result)


def memory_update(gates: Iterable[Any], c: Any) -> tuple[Any, Any]:
    """The carry and output of an LSTM from the gates before their nonlinearity."""
    i, f, g, o = gates
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def joined(*parts: Any) -> Any:
    """Side by side."""
    return jnp.concatenate(parts, axis=-1)


def lstm(w: dict[str, Any], x: Any, hoist: bool) -> tuple[Any, Step]:
    """What the scan runs over, and its body."""
    both = None if hoist else jnp.concatenate([w["weight_ih"], w["weight_hh"]])

    def step(state: Any, x_t: Any) -> Any:
        h, c = state
        z = x_t + h @ w["weight_hh"] if hoist else joined(x_t, h) @ both + w["bias_ih"]
        return memory_update(jnp.split(z, 4, axis=-1), c)

    return (x @ w["weight_ih"] + w["bias_ih"] if hoist else x), step


def peephole_norm(w: dict[str, Any], x: Any, hoist: bool) -> tuple[Any, Step]:
    """LSTM with peepholes, each gate layer-normalised."""
    both = None if hoist else jnp.concatenate([w["W"], w["U"]])

    def norm(v: Any, gate: str) -> Any:
        v = v - v.mean(axis=-1, keepdims=True)
        v = v * jax.lax.rsqrt((v * v).mean(axis=-1, keepdims=True) + 1e-5)
        return v * w[f"gain_{gate}"] + w[f"shift_{gate}"]

    def step(state: Any, x_t: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(x_t + h @ w["U"] if hoist else joined(x_t, h) @ both, 4, axis=-1)
        i = jax.nn.sigmoid(norm(i + w["p_i"] * c, "i"))
        f = jax.nn.sigmoid(norm(f + w["p_f"] * c, "f"))
        c = f * c + i * jnp.tanh(norm(g, "g"))
        h = jax.nn.sigmoid(norm(o + w["p_o"] * c, "o")) * jnp.tanh(c)
        return (h, c), h

    return (x @ w["W"] if hoist else x), step


def minimal_gated(w: dict[str, Any], x: Any, hoist: bool) -> tuple[Any, Step]:
    """Minimal gated unit (Zhou et al. 2016)."""
    size = w["U_f"].shape[0]
    both_f, both_g = jnp.concatenate([w["W"][:, :size], w["U_f"]]), jnp.concatenate([w["W"][:, size:], w["U_g"]])
    b_f, b_g = w["b"][:size], w["b"][size:]

    def step(h: Any, x_t: Any) -> Any:
        if hoist:
            f = jax.nn.sigmoid(x_t[:, :size] + h @ w["U_f"])
            g = jnp.tanh(x_t[:, size:] + (f * h) @ w["U_g"])
        else:
            f = jax.nn.sigmoid(joined(x_t, h) @ both_f + b_f)
            g = jnp.tanh(joined(x_t, f * h) @ both_g + b_g)
        h = h + f * (g - h)
        return h, h

    return (x @ w["W"] + w["b"] if hoist else x), step


def multiplicative(w: dict[str, Any], x: Any, hoist: bool) -> tuple[Any, Step]:
    """Multiplicative LSTM (Krause et al. 2016)."""
    both = None if hoist else jnp.concatenate([w["W"], w["V"]])

    def step(state: Any, xs: Any) -> Any:
        h, c = state
        if hoist:
            m_t, z_t = xs
            z = z_t + (m_t * (h @ w["U_m"])) @ w["V"]
        else:
            z = joined(xs, (xs @ w["W_m"]) * (h @ w["U_m"])) @ both + w["b"]
        return memory_update(jnp.split(z, 4, axis=-1), c)

    return ((x @ w["W_m"], x @ w["W"] + w["b"]) if hoist else x), step


def eight_matmuls(w: dict[str, Any], x: Any, hoist: bool) -> tuple[Any, Step]:
    """An LSTM as it stands in a textbook; hoisted: the four products of x before the loop."""

    def step(state: Any, xs: Any) -> Any:
        h, c = state
        of_x = xs if hoist else [xs @ w[f"W_{k}"] + w[f"b_{k}"] for k in "ifgo"]
        return memory_update((v + h @ w[f"U_{k}"] for v, k in zip(of_x, "ifgo", strict=True)), c)

    return (tuple(x @ w[f"W_{k}"] + w[f"b_{k}"] for k in "ifgo") if hoist else x), step


CELLS: dict[str, Callable[[dict[str, Any], Any, bool], tuple[Any, Step]]] = {
    "peephole-norm": peephole_norm,
    "minimal-gated": minimal_gated,
    "multiplicative": multiplicative,
    "eight-matmuls": eight_matmuls,
}
