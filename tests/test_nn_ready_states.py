"""Known calls of nn.Recurrent: states that are given, what they start from, and what does not live on."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from test_nn_ready import B, F, H, T, agree, sequence, used
from test_nn_ready import sequence as time_major
from test_nn_ready_cells import Own, closing_over, of_own, of_own_plainly

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops

__all__ = ["used"]


class Pair(nn.Module):
    """A user's cell whose state is a pair of arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(np.random.default_rng(2).standard_normal((F, H)))

    def initial_state(self, batch: int) -> Any:
        return np.zeros((batch, H)), np.ones((batch, H))

    def forward(self, x: Any, state: Any) -> Any:
        a, b = state
        a = ops.tanh(x @ self.w + a * b)
        return a, (a, 0.5 * b + a)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("make", [Pair, lambda: nn.LSTMCell(F, H, dtype=np.float64)])
def test_a_given_state(make: Any, batch_first: bool, used: list[bool]) -> None:
    layer = nn.Recurrent(make(), batch_first=batch_first)

    def sequence() -> np.ndarray:
        return np.swapaxes(time_major(), 0, 1) if batch_first else time_major()

    state = tuple(tg.tensor(np.random.default_rng(k).standard_normal((B, H)), requires_grad=True) for k in range(2))

    def found() -> list[np.ndarray]:
        layer.zero_grad()
        for part in state:
            part.grad = None
        y, (a, b) = layer(tg.tensor(sequence()), state)
        (ops.square(y).sum() + (a * b).sum()).backward()
        parameters = [p.grad for p in layer.parameters()]
        return [y.numpy(), a.numpy(), b.numpy(), *(part.grad for part in state), *parameters]

    first, again = found(), found()
    assert used == [True]
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    with tg.eager():
        agree(again, found())
    with pytest.raises(tg.ShapeError, match="state"):
        layer(tg.tensor(sequence()), state[:1])
    with pytest.raises(tg.DTypeError, match="float32"):
        layer(tg.tensor(sequence()), tuple(part.astype(np.float32) for part in state))
    agree([layer(tg.tensor(sequence()))[0].numpy()], [layer(sequence())[0].numpy()])


def test_an_array_to_start_from_is_the_callers(used: list[bool]) -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zeros = np.zeros((B, F))

        def initial_state(self, batch: int) -> Any:
            return self.zeros

        def forward(self, x: Any, h: Any) -> Any:
            h = h * h + x
            return h, h

    layer = nn.Recurrent(Kept())
    for k in range(3):
        layer.cell.zeros[:] = k
        x = tg.tensor(sequence(), requires_grad=True)
        y, state = layer(x)
        layer.cell.zeros[:] = -7.0  # after the forward has saved what it was
        y.sum().backward()
        h, grad = np.full((B, F), float(k)), []
        for row in sequence():
            grad.append(2.0 * h)
            h = h * h + row
        np.testing.assert_allclose(state.numpy(), h)
        later = np.ones((B, F))
        for t in range(T - 1, -1, -1):
            np.testing.assert_allclose(x.grad[t], later)
            later = 1.0 + later * grad[t]


@pytest.mark.parametrize("wanted", [{"return_states": True}, {"return_gates": True}])
@pytest.mark.parametrize("make", [lambda **wanted: nn.Recurrent(Own(), **wanted), functools.partial(nn.GRU, F, H)])
def test_trajectories_that_one_call_did_without(make: Any, wanted: dict[str, bool], used: list[bool]) -> None:
    layer = make(**wanted)
    x = tg.tensor(sequence().astype(next(iter(layer.parameters())).dtype))
    for _ in range(3):
        assert len(layer(x, return_states=False, return_gates=False)) == 2
        assert len(layer(x)) == 3
    assert True not in used


@pytest.mark.parametrize("kind", ["LSTM", "Recurrent", "Closed"])
def test_calls_that_are_not_kept_do_not_make_later_ones_run_step_by_step(kind: str) -> None:
    """After a call op by op, or with a captured tensor outside of the cell, there is nothing recorded to keep."""
    memory = tg.tensor(np.ones(F), requires_grad=True)
    layer = nn.LSTM(F, H, dtype=np.float64) if kind == "LSTM" else nn.Recurrent(
        nn.LSTMCell(F, H, dtype=np.float64) if kind == "Recurrent" else closing_over(memory)
    )  # fmt: skip
    x = tg.tensor(sequence(), requires_grad=True)
    with tg.eager():
        layer(x)
    for _ in range(3):
        y, _ = layer(x)
        assert y._node.record.primitive.name == "scan"
    layer(x, memory=0.5)


class Twice(nn.Module):
    """Both outputs are the state."""

    def initial_state(self, batch: int) -> Any:
        return np.zeros((batch, F))

    def forward(self, x: Any, h: Any) -> Any:
        h = ops.tanh(h + x)
        return (h, h), h


@pytest.mark.parametrize("requires_grad", [False, True])
def test_outputs_of_a_known_call_share_no_memory(requires_grad: bool, used: list[bool]) -> None:
    layer = nn.Recurrent(Twice())
    x = tg.tensor(sequence(), requires_grad=requires_grad)
    for _ in range(3):
        (a, b), h = layer(x)
        assert not np.shares_memory(a.numpy(), b.numpy())
        assert not np.shares_memory(a.numpy(), h.numpy())
    assert used == [True, True]


def test_the_initial_state_is_asked_for_once_a_call(used: list[bool]) -> None:
    """It may be drawn at random, or count."""

    class Counting(Own):
        kind = np.float64

        def initial_state(self, batch: int) -> Any:
            self.__dict__["calls"] += 1  # unseen
            return {"h": np.zeros((batch, H)), "n": np.zeros((batch, H))}

    class Seen(Own):
        def initial_state(self, batch: int) -> Any:
            self.calls += 1
            return super().initial_state(batch)

    for cell in (Counting(), Seen()):
        layer = nn.Recurrent(cell)
        for k in range(1, 5):
            layer(tg.tensor(sequence()))
            assert cell.calls == k
    assert True in used


def test_what_a_cell_started_from_does_not_live_on(used: list[bool]) -> None:
    class Given(Own):
        def initial_state(self, batch: int) -> Any:
            return {"h": self.__dict__["given"], "n": np.zeros((batch, H))}  # unseen

    layer = nn.Recurrent(Given())
    for _ in range(3):
        past = tg.tensor(np.ones((B, H)), requires_grad=True)
        layer.cell.__dict__["given"] = ops.sin(past)
        layer(tg.tensor(sequence()))
        del layer.cell.__dict__["given"]
        past = weakref.ref(past)
        gc.collect()
        assert past() is None
    assert used == [True, True]


def test_a_cell_that_was_replaced_does_not_live_on() -> None:
    layer = nn.Recurrent(Own())
    layer(tg.tensor(sequence()))
    layer(tg.tensor(sequence()[:2]))
    cell = weakref.ref(layer.cell)
    layer.cell = Own()
    layer(tg.tensor(sequence()[:3]))
    gc.collect()
    assert cell() is None


@pytest.mark.parametrize("instance", [False, True])
def test_a_layer_that_starts_in_a_way_of_its_own(instance: bool, used: list[bool]) -> None:
    class Started(nn.Recurrent):
        def start(self, batch: int, given: Any = None) -> Any:
            return np.full((batch, F), 3.0)

    layer = nn.Recurrent(Twice()) if instance else Started(Twice())
    if instance:
        layer.start = lambda batch, given: np.full((batch, F), 3.0)
    expected = np.full((B, F), 3.0)
    for row in sequence():
        expected = np.tanh(expected + row)
    for _ in range(3):
        np.testing.assert_allclose(layer(tg.tensor(sequence()))[1].numpy(), expected)
    assert used == []


SETTINGS = {"gain": 2.0}


class Methodical(Own):
    """Equations in many places."""

    gains: ClassVar[list[float]] = [1.5]
    named: ClassVar[dict[str, float]] = {"gain": 1.2}

    @property
    def gain(self) -> float:
        return SETTINGS["gain"]

    @staticmethod
    def fixed(h: Any) -> Any:
        return h * SETTINGS["gain"]

    @classmethod
    def shared(cls, h: Any) -> Any:
        return h * SETTINGS["gain"] * cls.named["gain"]

    def gate(self, h: Any) -> Any:
        return h * 0.9

    def initial_state(self, batch: int) -> Any:
        return {"h": np.zeros((batch, H)), "n": np.zeros((batch, H))}

    def forward(self, x: Any, state: Any) -> Any:
        return super().forward(x, {**state, "h": self.part(state["h"])})

    def part(self, h: Any) -> Any:
        return h


METHODICAL: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "method": (lambda s, h: s.gate(h), lambda p: p.setattr(Methodical, "gate", lambda self, h: -h)),
    "property": (lambda s, h: h * s.gain, lambda p: p.setitem(SETTINGS, "gain", 0.3)),
    "static": (lambda s, h: s.fixed(h), lambda p: p.setitem(SETTINGS, "gain", 0.3)),
    "class": (lambda s, h: s.shared(h), lambda p: p.setitem(SETTINGS, "gain", 0.3)),
    "list": (lambda s, h: h * s.gains[0], lambda p: p.setattr(Methodical, "gains", [0.3])),
    "dict": (lambda s, h: h * s.named["gain"], lambda p: p.setitem(Methodical.named, "gain", 0.3)),
    "hidden": (lambda s, h: h * s.scale, lambda p: p.setattr(Methodical, "scale", 0.1, raising=False)),
}


@pytest.mark.parametrize("name", METHODICAL)
def test_changes_of_a_users_class_count(name: str, monkeypatch: pytest.MonkeyPatch, used: list[bool]) -> None:
    part, change = METHODICAL[name]
    monkeypatch.setattr(Methodical, "part", lambda self, h: part(self, h))
    layer = nn.Recurrent(Methodical())
    for _ in range(3):
        before = of_own(layer)
    assert used == [True, True]
    change(monkeypatch)
    found = of_own(layer)
    agree(found, of_own_plainly(layer))
    assert any(not np.allclose(a, b) for a, b in zip(found, before, strict=True))
