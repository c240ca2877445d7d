"""Cells that change something of their own at every step: recorded once, they would keep the first values for ever."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops

T = 5
turns = 0  # of Global


@pytest.fixture(autouse=True)
def always_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")


class Cell(nn.Module):
    """``h = tanh(W x + h) * factor()``."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 4, dtype=np.float64)
        self.reset()

    def initial_state(self, batch: int) -> Any:
        self.reset()
        return tg.tensor(np.zeros((batch, 4)))

    def forward(self, x: Any, h: Any) -> Any:
        h = ops.tanh(self.lin(x) + h) * self.factor()
        return h, h

    def reset(self) -> None:
        """Before the first step."""

    def factor(self) -> float:
        """What is another number at every step."""
        return 1.0


class Number(Cell):
    def reset(self) -> None:
        self._t = 0

    def factor(self) -> float:
        self._t += 1
        return float(self._t)


class Flag(Cell):
    """Another first step; what comes after it is the same."""

    def reset(self) -> None:
        self.first = True

    def factor(self) -> float:
        first, self.first = self.first, False
        return 3.0 if first else 1.0


class Scalar(Cell):
    def reset(self) -> None:
        self.t = np.int64(0)

    def factor(self) -> float:
        self.t = self.t + 1
        return float(self.t)


class Array(Cell):
    def reset(self) -> None:
        self.t = np.zeros(2)

    def factor(self) -> float:
        self.t = self.t + 1
        return float(self.t[1])


class ArrayInPlace(Array):
    def factor(self) -> float:
        self.t += 1
        return float(self.t[1])


class Pair(Cell):
    def reset(self) -> None:
        self.t = (0, 0)

    def factor(self) -> float:
        self.t = (0, self.t[1] + 1)
        return float(self.t[1])


class Items(Cell):
    def reset(self) -> None:
        self.t: list[int] = []

    def factor(self) -> float:
        self.t.append(1)
        return float(len(self.t))


class Entry(Cell):
    def reset(self) -> None:
        self.t = {"n": 0}

    def factor(self) -> float:
        self.t["n"] += 1
        return float(self.t["n"])


class Set(Cell):
    def reset(self) -> None:
        self.t = {0}

    def factor(self) -> float:
        self.t.add(len(self.t))
        return float(len(self.t))


class Counter:
    n = 0


class Held(Cell):
    def reset(self) -> None:
        self.counter = Counter()

    def factor(self) -> float:
        self.counter.n += 1
        return float(self.counter.n)


class Inner(Cell):
    """In a module of its own."""

    def reset(self) -> None:
        self.lin.steps = 0  # type: ignore[attr-defined]

    def factor(self) -> float:
        self.lin.steps += 1  # type: ignore[attr-defined]
        return float(self.lin.steps)  # type: ignore[attr-defined]


class Global(Cell):
    def reset(self) -> None:
        global turns
        turns = 0

    def factor(self) -> float:
        global turns
        turns += 1
        return float(turns)


CHANGING = [Number, Flag, Scalar, Array, ArrayInPlace, Pair, Items, Entry, Set, Held, Inner, Global]


@pytest.mark.parametrize("given", [False, True], ids=["its state", "a given state"])
@pytest.mark.parametrize("kind", CHANGING, ids=lambda kind: kind.__name__)
def test_runs_step_by_step(kind: type[Cell], given: bool, rng: np.random.Generator) -> None:
    layer, x = nn.Recurrent(kind()), tg.tensor(rng.standard_normal((T, 2, 3)))
    h0 = tg.tensor(rng.standard_normal((2, 4))) if given else None

    def outcome() -> list[np.ndarray]:
        layer.cell.reset()
        layer.zero_grad()
        y, h = layer(x, h0)
        said.append(str(tg.explain()))
        (ops.sum(y * y) + ops.sum(h)).backward()
        return [y.numpy(), h.numpy(), *(p.grad for p in layer.parameters())]

    said: list[str] = []
    for _ in range(3):
        found = outcome()
        assert f"{kind.__name__} changes something at every step" in said[-1]
        with tg.eager():
            expected = outcome()
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


class Width(Cell):
    """Sets an attribute, to the same at every step."""

    def factor(self) -> float:
        self.width = 4
        return 1.0


class Mask(Cell):
    """Keeps what it has made once."""

    def reset(self) -> None:
        self.masks: dict[int, np.ndarray] = {}

    def factor(self) -> Any:
        if 4 not in self.masks:
            self.masks[4] = np.array([1.0, 0.0, 1.0, 0.5])
        return self.masks[4]


class Buffer(Cell):
    """Makes an array anew at every step, with the same numbers."""

    def factor(self) -> Any:
        self.buffer = np.array([1.0, 0.0, 1.0, 0.5])
        return self.buffer


@pytest.mark.parametrize("kind", [Cell, Width, Mask, Buffer], ids=lambda kind: kind.__name__)
def test_what_stays_as_it_is_is_compiled(kind: type[Cell], rng: np.random.Generator) -> None:
    layer, x = nn.Recurrent(kind()), tg.tensor(rng.standard_normal((T, 2, 3)))
    for _ in range(3):
        found = layer(x)[0].numpy()
        assert tg.explain().lowered
        with tg.eager():
            np.testing.assert_allclose(found, layer(x)[0].numpy(), rtol=1e-12)


def test_a_cell_whose_class_is_of_no_module(rng: np.random.Generator) -> None:
    names: dict[str, Any] = {"nn": nn}
    exec("class Cell(nn.GRUCell):\n    def forward(self, x, h):\n        return nn.GRUCell.forward(self, x, h)", names)
    assert names["Cell"].forward.__module__ is None
    layer, x = nn.Recurrent(names["Cell"](3, 4)), tg.tensor(rng.standard_normal((T, 2, 3)).astype(np.float32))
    np.testing.assert_array_equal(layer(x)[0].numpy(), layer(x)[0].numpy())
