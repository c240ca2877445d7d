"""Matrices in every order, read as they are and transposed, in loops of one step and of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from native_cells import runs as runs

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops

WIDTH = 6


def strided(w: np.ndarray) -> np.ndarray:
    """With a step between columns."""
    wide = np.zeros((w.shape[0], 2 * w.shape[1]))
    wide[:, ::2] = w
    return wide[:, ::2]


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rows": np.ascontiguousarray, "columns": np.asfortranarray, "strided": strided
}  # fmt: skip
USES: dict[str, Callable[[Any, Any], Any]] = {
    "as it is": lambda h, w: ops.tanh(h @ w),
    "transposed": lambda h, w: ops.tanh(h @ w.T),
    "both": lambda h, w: ops.tanh(ops.tanh(h @ w) @ w.T),
    "its rows, too": lambda h, w: ops.tanh(h @ w + w[0]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (1, 4), (1, 5), (3, 2), (3, 6)])
def test_a_matrix_in_any_order(
    use: str, layout: str, steps: int, rows: int, runs: list[bool], rng: np.random.Generator
) -> None:
    data = rng.standard_normal((WIDTH, WIDTH)) / 2
    x, h0 = rng.standard_normal((steps, rows, WIDTH)), rng.standard_normal((rows, WIDTH))

    def outcome(w: np.ndarray) -> list[np.ndarray]:
        matrix, start = tg.Tensor(w, True), tg.tensor(h0, requires_grad=True)
        body = lambda h, v: (USES[use](h, matrix) + v,) * 2
        final, ys = ops.scan(body, start, x)
        (ops.sum(final * final) + ops.sum(ys)).backward()
        return [final.numpy(), ys.numpy(), matrix.grad, start.grad]

    found = outcome(LAYOUTS[layout](data))
    assert len(runs) == 2
    with tg.eager():
        expected = outcome(data)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["always", "never"])
def test_results_share_no_memory_whatever_was_called_before(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reshape is a view of some arrays and a copy of others: what two results share is seen at each call."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", mode)

    def body(h: Any, x: Any) -> tuple[Any, Any]:
        h = ops.tanh(h + ops.reshape(x, (6,)))
        return h, (ops.reshape(x, (6,)), ops.reshape(x, (6,)))

    h0 = tg.tensor(np.zeros(6), requires_grad=True)
    x = np.arange(30.0).reshape(5, 2, 3)
    other = ops.transpose(tg.tensor(np.ascontiguousarray(x.transpose(0, 2, 1))), (0, 2, 1))
    for operand in (tg.tensor(x), other, tg.tensor(x)):
        _, (u, v) = ops.scan(body, h0, operand)
        u.data[...] = -1.0
        np.testing.assert_array_equal(v.numpy(), x.reshape(5, 6))
        np.testing.assert_array_equal(operand.numpy(), x)


def test_gradients_share_no_memory_whatever_the_cotangent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    a, b = (tg.tensor(np.ones((5, 6)), requires_grad=True) for _ in range(2))
    cotangent = np.arange(30.0).reshape(5, 2, 3)
    for seed in (cotangent, np.ascontiguousarray(cotangent.transpose(0, 2, 1)).transpose(0, 2, 1)):
        a.zero_grad()
        b.zero_grad()
        remove = a.register_hook(lambda g: g.data.fill(7.0))
        _, ys = ops.scan(lambda h, x: (h, ops.reshape(x[0] + x[1], (2, 3))), np.zeros(1), (a, b))
        ys.backward(seed)
        remove()
        assert (a.grad == 7.0).all()
        np.testing.assert_array_equal(b.grad, cotangent.reshape(5, 6))


def test_an_array_in_the_place_of_a_parameter_is_recorded_anew() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [nn.Parameter(np.ones((3, 4), np.float32)), nn.Parameter(np.ones(4, np.float32))]

        def initial_state(self, batch: int) -> Any:
            return tg.tensor(np.zeros((batch, 4), np.float32))

        def forward(self, x: Any, h: Any) -> Any:
            h = ops.tanh(h + x @ self.parts[0] * self.parts[1])
            return h, h

    cell, x = Cell(), np.ones((2, 1, 3), np.float32)
    layer = nn.Recurrent(cell)
    for _ in range(3):
        before = layer(x)[0].numpy()
    cell.parts[1] = np.zeros(4, np.float32)
    assert before.all() and not layer(x)[0].numpy().any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 2, 3, 8, 9, 16, 17])
def test_rows_of_any_width(width: int, dtype: Any, runs: list[bool], rng: np.random.Generator) -> None:
    """Sums, extrema, truth values and numbers of a row, in rows that fill a vector and that do not."""
    x, h0 = rng.standard_normal((3, 5, width)).astype(dtype), rng.standard_normal((5, width)).astype(dtype)

    def body(h: Any, v: Any) -> Any:
        centred = h - h.mean(axis=-1, keepdims=True)
        scale = ops.sqrt((centred * centred).sum(axis=-1, keepdims=True) + 0.1)
        most, least = h.max(axis=-1, keepdims=True), h.min(axis=-1, keepdims=True)
        above = centred > 0.0
        h = ops.where(above, ops.sigmoid(centred / scale), ops.tanh(v)) + 0.1 * (most - least) * v
        return h, (h, above, ops.exp(least))

    def outcome() -> list[np.ndarray]:
        start, xs = tg.tensor(h0, requires_grad=True), tg.tensor(x, requires_grad=True)
        final, (ys, above, least) = ops.scan(body, start, xs)
        (ops.sum(final * final) + ops.sum(ys * ys) + ops.sum(least)).backward()
        return [final.numpy(), ys.numpy(), above.numpy(), least.numpy(), xs.grad, start.grad]

    found = outcome()
    assert len(runs) == 2
    with tg.eager():
        expected = outcome()
    bound = 1e-12 if dtype is np.float64 else 2e-5
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)
