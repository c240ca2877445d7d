"""Cells as a user of this library types them: plain ops, nothing arranged for speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_lstm import nn, ops


class Cell(nn.Module):
    """Holds the given weights under their names; the state is (h, c)."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value))
        self.hidden = next(value.shape[0] for name, value in weights.items() if name[0] in "UV")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def initial_state(self, batch: int) -> Any:
        """Zeros."""
        return np.zeros((batch, self.hidden), np.float32), np.zeros((batch, self.hidden), np.float32)


def norm(v: Any, gain: Any, shift: Any) -> Any:
    """Layer normalisation (Ba et al. 2016)."""
    v = v - v.mean(axis=-1, keepdims=True)
    return v / ops.sqrt((v * v).mean(axis=-1, keepdims=True) + 1e-5) * gain + shift


class PeepholeNorm(Cell):
    """LSTM with peepholes (Gers et al. 2002), each gate layer-normalised."""

    def forward(self, x: Any, state: Any) -> Any:
        """One step."""
        h, c = state
        i, f, g, o = ops.chunk(x @ self.W + h @ self.U, 4)
        i = ops.sigmoid(norm(i + self.p_i * c, self.gain_i, self.shift_i))
        f = ops.sigmoid(norm(f + self.p_f * c, self.gain_f, self.shift_f))
        c = f * c + i * ops.tanh(norm(g, self.gain_g, self.shift_g))
        h = ops.sigmoid(norm(o + self.p_o * c, self.gain_o, self.shift_o)) * ops.tanh(c)
        return h, (h, c)


class MinimalGated(Cell):
    """Minimal gated unit (Zhou et al. 2016)."""

    def initial_state(self, batch: int) -> Any:
        """Zeros, h alone."""
        return np.zeros((batch, self.hidden), np.float32)

    def forward(self, x: Any, h: Any) -> Any:
        """One step."""
        f, g = ops.chunk(x @ self.W + self.b, 2)
        f = ops.sigmoid(f + h @ self.U_f)
        g = ops.tanh(g + (f * h) @ self.U_g)
        h = (1.0 - f) * h + f * g
        return h, h


class Multiplicative(Cell):
    """Multiplicative LSTM (Krause et al. 2016): the second product takes the first one's result."""

    def forward(self, x: Any, state: Any) -> Any:
        """One step."""
        h, c = state
        m = (x @ self.W_m) * (h @ self.U_m)
        i, f, g, o = ops.chunk(x @ self.W + m @ self.V + self.b, 4)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
        return h, (h, c)


class EightMatmuls(Cell):
    """An LSTM as it stands in a textbook."""

    def forward(self, x: Any, state: Any) -> Any:
        """One step."""
        h, c = state
        i = ops.sigmoid(x @ self.W_i + h @ self.U_i + self.b_i)
        f = ops.sigmoid(x @ self.W_f + h @ self.U_f + self.b_f)
        g = ops.tanh(x @ self.W_g + h @ self.U_g + self.b_g)
        o = ops.sigmoid(x @ self.W_o + h @ self.U_o + self.b_o)
        c = f * c + i * g
        h = o * ops.tanh(c)
        return h, (h, c)


CELLS: dict[str, type[Cell]] = {
    "peephole-norm": PeepholeNorm,
    "minimal-gated": MinimalGated,
    "multiplicative": Multiplicative,
    "eight-matmuls": EightMatmuls,
}
