"""Operators of ONNX that are loops over time: Scan, RNN, GRU, LSTM.

Each is one ``ops.scan``; the equations of the three cells are those of the operators' specification, whose order of
gates, forms and activations differ from PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.errors import UnsupportedError
from tinygrad_lstm.interop.operators import Call, operator
from tinygrad_lstm.tensor import Tensor, asarray


@operator("Scan")
def _scan(call: Call) -> list[Any]:
    if call.version < 9:
        raise UnsupportedError(f"the form of operator set {call.version} is not supported, only that from 9 on")
    body, count = call.get("body"), call.get("num_scan_inputs")
    carry = [asarray(a) for a in call.args[: len(call.args) - count]]
    xs = [asarray(a) for a in call.args[len(call.args) - count :]]
    n_ys = len(body.outputs) - len(carry)
    x_back, y_back = (_each(call, f"scan_{side}_directions", n) for side, n in (("input", count), ("output", n_ys)))
    x_axes, y_axes = (_each(call, f"scan_{side}_axes", n) for side, n in (("input", count), ("output", n_ys)))
    xs = [ops.moveaxis(x, axis, 0) if axis else x for x, axis in zip(xs, x_axes, strict=True)]
    reverse = all([*x_back, *y_back])
    if not reverse:
        xs = [ops.flip(x, 0) if back else x for x, back in zip(xs, x_back, strict=True)]

    def step(state: list[Any], inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = [asarray(out) for out in call.inner(body, [*state, *inputs])]
        return outs[: len(carry)], outs[len(carry) :]

    final, ys = ops.scan(step, carry, xs, reverse=reverse)
    if not reverse:
        ys = [ops.flip(y, 0) if back else y for y, back in zip(ys, y_back, strict=True)]
    return [*final, *(ops.moveaxis(y, 0, axis) if axis else y for y, axis in zip(ys, y_axes, strict=True))]


def _each(call: Call, name: str, count: int) -> list[int]:
    return call.get(name) or [0] * count


# ---------------------------------------------------------------------------- activations

# Name -> function of (x, alpha, beta), and the defaults of alpha and beta.
_ACTIVATIONS: dict[str, tuple[Callable[..., Any], float, float]] = {
    "sigmoid": (lambda x, a, b: ops.sigmoid(x), 0.0, 0.0),
    "tanh": (lambda x, a, b: ops.tanh(x), 0.0, 0.0),
    "relu": (lambda x, a, b: ops.relu(x), 0.0, 0.0),
    "softsign": (lambda x, a, b: x / (1.0 + ops.abs(x)), 0.0, 0.0),
    "softplus": (lambda x, a, b: ops.softplus(x), 0.0, 0.0),
    "leakyrelu": (lambda x, a, b: ops.leaky_relu(x, a), 0.01, 0.0),
    "elu": (lambda x, a, b: ops.elu(x, a), 1.0, 0.0),
    "hardsigmoid": (lambda x, a, b: ops.clip(x * a + b, 0.0, 1.0), 0.2, 0.5),
    "scaledtanh": (lambda x, a, b: ops.tanh(x * b) * a, 1.0, 1.0),
    "affine": (lambda x, a, b: x * a + b, 1.0, 0.0),
}


def _activations(call: Call, default: list[str], directions: int) -> list[list[Callable[..., Any]]]:
    """The activation functions of each direction."""
    names = call.get("activations") or default * directions
    # The lists hold values only for those functions that have any, in order.
    alphas, betas = iter(call.get("activation_alpha") or []), iter(call.get("activation_beta") or [])
    width = len(default)
    made = []
    for k, name in enumerate(names):
        if name.lower() not in _ACTIVATIONS:
            raise UnsupportedError(f"the activation {name!r} is not supported, only {', '.join(_ACTIVATIONS)}")
        function, alpha, beta = _ACTIVATIONS[name.lower()]
        alpha = next(alphas, alpha) if alpha or beta else alpha
        beta = next(betas, beta) if beta or name.lower() == "affine" else beta
        # What is clipped are the sums of gates, not the cell state that the LSTM's third function sees (onnxruntime).
        made.append(_bound(function, alpha, beta, call.get("clip") if k % width < 2 else None))
    return [made[k * width : (k + 1) * width] for k in range(directions)]


def _bound(function: Callable[..., Any], alpha: float, beta: float, clip: float | None) -> Callable[..., Any]:
    if clip is None:
        return lambda x: function(x, alpha, beta)
    return lambda x: function(ops.clip(x, -clip, clip), alpha, beta)


# ---------------------------------------------------------------------------- cells


def _rnn_step(w: Any, r: Any, wb: Any, rb: Any, p: Any, functions: list[Any], call: Call) -> Callable[..., Any]:
    (f,) = functions

    def step(state: list[Any], x: Any) -> tuple[list[Any], Any]:
        h = f(x @ w.T + wb + state[0] @ r.T + rb)
        return [h], h

    return step


def _gru_step(w: Any, r: Any, wb: Any, rb: Any, p: Any, functions: list[Any], call: Call) -> Callable[..., Any]:
    """``h' = (1 - z) * n + z * h``; the reset gate in front of the product, or behind it (linear_before_reset)."""
    f, g = functions
    r_zr, r_n = ops.split(r, [2 * r.shape[-1]], 0)
    rb_zr, rb_n = ops.split(rb, [2 * r.shape[-1]], 0)
    behind = call.get("linear_before_reset", 0)

    def step(state: list[Any], x: Any) -> tuple[list[Any], Any]:
        (h,) = state
        x_z, x_r, x_n = ops.chunk(x @ w.T + wb, 3)
        h_z, h_r = ops.chunk(h @ r_zr.T + rb_zr, 2)
        z, reset = f(x_z + h_z), f(x_r + h_r)
        n = g(x_n + (reset * (h @ r_n.T + rb_n) if behind else (reset * h) @ r_n.T + rb_n))
        h = (1.0 - z) * n + z * h
        return [h], h

    return step


def _lstm_step(w: Any, r: Any, wb: Any, rb: Any, p: Any, functions: list[Any], call: Call) -> Callable[..., Any]:
    """Gates in the order i, o, f, c; peepholes in the order i, o, f."""
    f, g, final = functions
    call.only(input_forget=(0,))
    peep = [0.0, 0.0, 0.0] if p is None else ops.chunk(p, 3)

    def seen(z: Any, weight: Any, c: Any) -> Any:
        return z if p is None else z + weight * c

    def step(state: list[Any], x: Any) -> tuple[list[Any], Any]:
        h, c = state
        z_i, z_o, z_f, z_g = ops.chunk(x @ w.T + wb + h @ r.T + rb, 4)
        i, forget = f(seen(z_i, peep[0], c)), f(seen(z_f, peep[2], c))
        c = forget * c + i * g(z_g)
        h = f(seen(z_o, peep[1], c)) * final(c)
        return [h, c], h

    return step


_CELLS: dict[str, tuple[Callable[..., Any], int, list[str]]] = {
    "RNN": (_rnn_step, 1, ["Tanh"]),
    "GRU": (_gru_step, 3, ["Sigmoid", "Tanh"]),
    "LSTM": (_lstm_step, 4, ["Sigmoid", "Tanh", "Tanh"]),
}


@operator(*_CELLS)
def _recurrent(call: Call) -> list[Any]:
    """X, W, R, B, sequence_lens, initial_h, initial_c, P -> Y, Y_h, Y_c."""
    make, gates, default = _CELLS[call.op]
    x, w, r = (asarray(a) for a in call.args[:3])
    bias, lengths, peep = call.arg(3), call.arg(4), call.arg(7)
    batch_first = call.get("layout", 0)
    if batch_first:
        x = ops.swapaxes(x, 0, 1)
    direction = call.get("direction", "forward")
    reverses = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    functions = _activations(call, default, len(reverses))
    hidden, batch = r.shape[-1], x.shape[1]
    states = [call.arg(5), call.arg(6)][: 2 if call.op == "LSTM" else 1]
    outputs: list[Any] = []
    finals: list[list[Any]] = []
    for k, reverse in enumerate(reverses):
        start = []
        for given in states:
            if given is None:
                start.append(Tensor(np.zeros((batch, hidden), x.dtype)))
            else:
                start.append(asarray(given)[:, k] if batch_first else asarray(given)[k])
        halves = [np.zeros((), x.dtype)] * 2 if bias is None else ops.chunk(asarray(bias)[k], 2)
        rb = ops.broadcast_to(halves[1], (gates * hidden,))
        peeps = None if peep is None else asarray(peep)[k]
        step = make(w[k], r[k], halves[0], rb, peeps, functions[k], call)
        final, y = ops.scan(step, start, x, lengths=_lengths(lengths), reverse=reverse)
        outputs.append(y)
        finals.append(final)
    axis = 0 if not batch_first else 1
    y = ops.stack(outputs, 1)
    if batch_first:
        y = ops.moveaxis(y, 2, 0)
    return [y, *(ops.stack([final[k] for final in finals], axis) for k in range(len(states)))][: max(call.n_outputs, 1)]


def _lengths(lengths: Any) -> Any:
    return None if lengths is None else lengths.astype(np.int64)
