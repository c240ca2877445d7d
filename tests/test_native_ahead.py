"""Products of a loop's inputs: made in the loop, for several steps at once where these have few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.compiler.ahead import BLOCK
from tinygrad_lstm.kernels import codecache

F, H = 5, 7
# How the rows of an input lie in memory, as (T, B, F).
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one after another": lambda x: x,
    "sequence by sequence": lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1),
    "backwards": lambda x: x[::-1],
    "every other row": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "one row for all": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "one step for all": lambda x: np.broadcast_to(x[:1], x.shape),
}


@pytest.fixture(autouse=True)
def always_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    threads = tg.get_num_threads()
    yield
    tg.set_num_threads(threads)


def two_inputs(h: Any, x: Any, w: Any, u: Any) -> Any:
    """Two products of inputs, one of which shares its place with a product of the state."""
    one, two = x
    joined = ops.concatenate([h @ u[:H], one @ w, two @ w], axis=-1)
    h = ops.tanh(ops.sum(ops.reshape(joined, (*h.shape[:1], 3, H)), axis=1))
    return h, h


def an_output(h: Any, x: Any, w: Any, u: Any) -> Any:
    """The product is a result itself."""
    z = x[0] @ w
    h = ops.tanh(z + h @ u[:H] + ops.sum(x[1], axis=-1, keepdims=True))
    return h, (h, z)


def a_part(h: Any, x: Any, w: Any, u: Any) -> Any:
    """A product of a part of the input, and one of all of it."""
    h = ops.tanh(x[0][:, 1:3] @ w[1:3] + x[1] @ w + h @ u[:H])
    return h, h


BODIES = {"two inputs": two_inputs, "an output": an_output, "a part": a_part}


def outcome(body: Any, steps: int, rows: int, layout: str, reverse: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(steps * 100 + rows)
    xs = [LAYOUTS[layout](rng.standard_normal((steps, rows, F))), rng.standard_normal((steps, rows, F))]
    leaves = [tg.asarray(a) for a in (rng.standard_normal((rows, H)), *xs)]
    leaves += [tg.asarray(rng.standard_normal(shape) / 3) for shape in ((F, H), (2 * H, H))]
    for leaf in leaves:
        leaf.requires_grad = True
    h, one, two, w, u = leaves
    carry, ys = ops.scan(lambda h, x: body(h, x, w, u), h, (one, two), reverse=reverse)
    parts = [carry, *(ys if isinstance(ys, tuple) else (ys,))]
    sum((ops.square(part) * (k + 1.5)).sum() for k, part in enumerate(parts)).backward()
    return [*(part.numpy() for part in parts), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BODIES)
def test_as_step_by_step(name: str, layout: str, threads: int) -> None:
    tg.set_num_threads(threads)
    few = [(1, 2), (2, 1), (3, 3), (BLOCK + 3, 1), (BLOCK // 2 + 1, 3), (5, 4)]
    for steps, rows in [*few, (3, BLOCK // 2 + 1), (2, BLOCK), (2, 2 * BLOCK + 1)]:
        for reverse in (False, True):
            found = outcome(BODIES[name], steps, rows, layout, reverse)
            with tg.eager():
                expected = outcome(BODIES[name], steps, rows, layout, reverse)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_the_same_bits_for_any_number_of_rows_and_threads() -> None:
    layer = nn.LSTM(40, 24)
    x = np.random.default_rng(0).standard_normal((9, 2 * BLOCK, 40)).astype(np.float32)
    with tg.no_grad():
        whole = layer(x)[0].numpy()
        for threads in (1, 2):
            tg.set_num_threads(threads)
            for rows in (1, 2, 3, 7, BLOCK // 2, BLOCK + 1):
                np.testing.assert_array_equal(layer(x[:, :rows])[0].numpy(), whole[:, :rows])


def test_one_text_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    load = codecache.load

    def watched(source: str, *args: Any, **options: Any) -> Any:
        texts.append(source)
        return load(source, *args, **options)

    monkeypatch.setattr(codecache, "load", watched)
    layer = nn.LSTM(11, 13)
    for steps, rows in [(2, 3), (3, 1), (70, 1), (3, 8), (2, 40), (2, 130)]:
        layer(np.ones((steps, rows, 11), np.float32))[0].sum().backward()
    loops = {text for text in texts if "def loop(" in text}
    assert len(loops) == 2  # forward and backward
    assert any("together" in text for text in loops)


def test_a_loop_says_so() -> None:
    layer = nn.LSTM(11, 13)
    with tg.no_grad():
        layer(np.ones((3, 2, 11), np.float32))
    assert "several steps at once" in str(tg.explain())
