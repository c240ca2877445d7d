"""An LSTM in NumPy with its gradients by hand, as a careful author would write them: a peer, nothing else uses it.

Every array is made once.  The input projection is one product over all steps; sigmoid(z) = (1 + tanh(z / 2)) / 2,
so that one call of tanh serves all gates (the factor goes into the weights); what the backward loop multiplies by is
prepared for some steps at a time while they are in the cache; the weights' gradients are one product with inner axis
T * B.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .work import Case, Work, inputs, shape_of, weights

LIBRARIES = ("numpy",)
CHUNK = 1 << 18  # bytes of gates whose factors are prepared together


class Layer:
    """One layer; ``forward`` fills ``h[1:]``, ``backward`` the gradients."""

    def __init__(self, w: dict[str, np.ndarray], k: int, steps: int, batch: int) -> None:
        self.w_ih, self.w_hh, self.b_ih, self.b_hh = (
            w[f"{name}_l{k}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        self.names = [f"{name}_l{k}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        dtype, (rows, width) = self.w_ih.dtype, self.w_ih.shape
        hidden = rows // 4
        self.steps, self.batch, self.hidden = steps, batch, hidden
        self.half = np.repeat(np.array([0.5, 0.5, 1.0, 0.5], dtype), hidden)
        self.shift = 1 - self.half
        self.shift[2 * hidden : 3 * hidden] = 0
        self.wt, self.ut = np.empty((width, rows), dtype), np.empty((hidden, rows), dtype)
        self.bias, self.scratch = np.empty(rows, dtype), np.empty((batch, rows), dtype)
        self.a = np.empty((steps, batch, rows), dtype)
        self.c, self.h = np.zeros((steps + 1, batch, hidden), dtype), np.zeros((steps + 1, batch, hidden), dtype)
        self.tc, self.q = np.empty((steps, batch, hidden), dtype), np.empty((steps, batch, hidden), dtype)
        self.small = np.empty((batch, hidden), dtype)
        self.dz = np.empty((steps, batch, 4, hidden), dtype)
        self.dh, self.dc = np.empty((batch, hidden), dtype), np.empty((batch, hidden), dtype)
        self.ones = np.ones(steps * batch, dtype)
        self.gw, self.gu, self.gb = np.empty_like(self.w_ih), np.empty_like(self.w_hh), np.empty(rows, dtype)
        self.dx = np.empty((steps * batch, width), dtype)
        self.gates = [tuple(np.split(self.a[t], 4, axis=1)) for t in range(steps)]
        self.chunk = max(1, CHUNK // (batch * rows * dtype.itemsize))

    def forward(self, x: np.ndarray) -> None:
        """``x (T * B, I)``."""
        np.multiply(self.w_ih.T, self.half, out=self.wt)
        np.multiply(self.w_hh.T, self.half, out=self.ut)
        np.add(self.b_ih, self.b_hh, out=self.bias)
        np.multiply(self.bias, self.half, out=self.bias)
        self.x = x
        flat = self.a.reshape(len(x), -1)
        np.dot(x, self.wt, out=flat)
        flat += self.bias
        scratch, small, half, shift, ut = self.scratch, self.small, self.half, self.shift, self.ut
        for t in range(self.steps):
            a, (i, f, g, o), c, tc = self.a[t], self.gates[t], self.c[t + 1], self.tc[t]
            np.dot(self.h[t], ut, out=scratch)
            np.add(a, scratch, out=a)
            np.tanh(a, out=a)
            np.multiply(a, half, out=a)
            np.add(a, shift, out=a)
            np.multiply(f, self.c[t], out=c)
            np.multiply(i, g, out=small)
            np.add(c, small, out=c)
            np.tanh(c, out=tc)
            np.multiply(o, tc, out=self.h[t + 1])

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """``dy (T, B, H)`` to ``dx (T * B, I)``; fills gw, gu, gb."""
        dh, dc, small, w_hh = self.dh, self.dc, self.small, self.w_hh
        dh.fill(0)
        dc.fill(0)
        flat = self.dz.reshape(self.steps, self.batch, -1)
        for stop in range(self.steps, 0, -self.chunk):
            start = max(0, stop - self.chunk)
            self._factors(start, stop)
            for t in range(stop - 1, start - 1, -1):
                dz = self.dz[t]
                np.add(dh, dy[t], out=dh)
                np.multiply(dh, self.q[t], out=small)
                np.add(dc, small, out=dc)
                np.multiply(dz[:, :3], dc[:, None], out=dz[:, :3])
                np.multiply(dz[:, 3], dh, out=dz[:, 3])
                np.dot(flat[t], w_hh, out=dh)
                np.multiply(dc, self.gates[t][1], out=dc)
        dz = self.dz.reshape(self.steps * self.batch, -1)
        np.dot(dz.T, self.x, out=self.gw)
        np.dot(dz.T, self.h[:-1].reshape(len(dz), -1), out=self.gu)
        np.dot(self.ones, dz, out=self.gb)
        return np.dot(dz, self.w_ih, out=self.dx)

    def _factors(self, start: int, stop: int) -> None:
        """Per gate, what dc (for o: dh) is multiplied by, into dz; and o * (1 - tanh(c)^2) into q."""
        size, s = self.hidden, slice(start, stop)
        i, _, g, o = (self.a[s, :, k * size : (k + 1) * size] for k in range(4))
        tc, dz = self.tc[s], self.dz[s]
        np.subtract(1, self.a[s].reshape(dz.shape), out=dz)
        np.multiply(dz, self.a[s].reshape(dz.shape), out=dz)
        dz[:, :, 0] *= g
        dz[:, :, 1] *= self.c[s]
        np.multiply(g, g, out=dz[:, :, 2])
        np.subtract(1, dz[:, :, 2], out=dz[:, :, 2])
        dz[:, :, 2] *= i
        dz[:, :, 3] *= tc
        q = self.q[s]
        np.multiply(tc, tc, out=q)
        np.subtract(1, q, out=q)
        np.multiply(q, o, out=q)

    def gradients(self) -> dict[str, np.ndarray]:
        """By name, copied."""
        values = (self.gw, self.gu, self.gb, self.gb)
        return {name: value.copy() for name, value in zip(self.names, values, strict=True)}


def build(work: Work, options: dict[str, Any]) -> Case:
    """The LSTM alone: nobody types a custom cell's backward for a comparison."""
    steps, batch, _, hidden, layers = shape_of(work)
    w, x = weights(work), inputs(work).reshape(steps * batch, -1)
    stack = [Layer(w, k, steps, batch) for k in range(layers)]
    dy = np.empty((steps, batch, hidden), x.dtype)

    def forward() -> np.ndarray:
        value = x
        for layer in stack:
            layer.forward(value)
            value = layer.h[1:].reshape(steps * batch, hidden)
        return stack[-1].h[1:]

    def step() -> Any:
        y = forward()
        loss = np.dot(y.ravel(), y.ravel())
        np.multiply(y, 2, out=dy)
        slope = dy
        for layer in reversed(stack):
            slope = layer.backward(slope).reshape(steps, batch, -1)
        return loss

    def result() -> dict[str, np.ndarray]:
        if work.kind == "forward":
            return {"y": forward().copy()}
        found = {"loss": np.asarray(step())}
        for layer in stack:
            found |= layer.gradients()
        return found | {"x": stack[0].dx.reshape(steps, batch, -1).copy()}

    return Case(forward if work.kind == "forward" else step, result)
