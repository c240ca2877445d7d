"""Attributes of a user's cell of which no version tells: what is in lists, dicts, objects and functions counts."""

from __future__ import annotations

import argparse
import copy
import enum
import functools
import gc
import pickle
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_nn_ready import F, H, agree, sequence, used

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.nn import programs

__all__ = ["used"]


class Settings:
    def __init__(self, scale: float = 0.5) -> None:
        self.scale = scale

    def read(self) -> float:
        return self.scale


@dataclass
class Config:
    scale: float = 0.5


class Colour(enum.Enum):
    RED = 1


def times(x: float, factor: float) -> float:
    return x * factor


def closed() -> Callable[[], float]:
    box = [0.5]
    return lambda: box[0]


def box_of(function: Any) -> Any:
    return function.__closure__[0].cell_contents


class Kind(NamedTuple):
    make: Callable[[], Any]
    read: Callable[[Any], float]
    change: Callable[[Any], Any]


KINDS = {
    "list": Kind(lambda: [0.5], lambda v: v[0], lambda v: v.__setitem__(0, 0.3)),
    "longer list": Kind(lambda: [0.5], lambda v: 0.5 * len(v), lambda v: v.append(1)),
    "dict": Kind(lambda: {"a": 0.5}, lambda v: v["a"], lambda v: v.update(a=0.3)),
    "another key": Kind(lambda: {"a": 0.5}, lambda v: v.get("b", 0.5), lambda v: (v.pop("a"), v.update(b=0.3))),
    "nested": Kind(lambda: {"a": [[0.5]]}, lambda v: v["a"][0][0], lambda v: v["a"][0].__setitem__(0, 0.3)),
    "tuple of lists": Kind(lambda: ([0.5],), lambda v: v[0][0], lambda v: v[0].__setitem__(0, 0.3)),
    "set": Kind(lambda: {1}, lambda v: 0.5 * len(v), lambda v: v.add(2)),
    "object": Kind(Settings, lambda v: v.scale, lambda v: setattr(v, "scale", 0.3)),
    "object in a list": Kind(lambda: [Settings()], lambda v: v[0].scale, lambda v: setattr(v[0], "scale", 0.3)),
    "dataclass": Kind(Config, lambda v: v.scale, lambda v: setattr(v, "scale", 0.3)),
    "namespace": Kind(lambda: SimpleNamespace(a=0.5), lambda v: v.a, lambda v: setattr(v, "a", 0.3)),
    "arguments": Kind(lambda: argparse.Namespace(a=0.5), lambda v: v.a, lambda v: setattr(v, "a", 0.3)),
    "method": Kind(lambda: Settings().read, lambda v: v(), lambda v: setattr(v.__self__, "scale", 0.3)),
    "partial": Kind(lambda: functools.partial(times, factor=1), lambda v: v(1), lambda v: v.keywords.update(factor=2)),
    "closure": Kind(closed, lambda v: v(), lambda v: box_of(v).__setitem__(0, 0.3)),
}  # fmt: skip
OPAQUE = {"deque": Kind(lambda: deque([0.5]), lambda v: v[0], lambda v: v.__setitem__(0, 0.3))}


class Keeps(nn.Module):
    """A cell with one more attribute."""

    def __init__(self, kept: Any, read: Any = None) -> None:
        super().__init__()
        rng = np.random.default_rng(5)
        self.w = nn.Parameter(rng.standard_normal((F, H)))
        self.u = nn.Parameter(0.3 * rng.standard_normal((H, H)))
        self.kept = kept
        self.__dict__["read"] = read

    def initial_state(self, batch: int) -> Any:
        return np.zeros((batch, H))

    def factor(self) -> Any:
        return 1.0 if self.read is None else self.read(self.kept)

    def forward(self, x: Any, h: Any) -> Any:
        h = ops.tanh(x @ self.w + h @ self.u) * self.factor()
        return h, h


def outcome(layer: Any) -> list[np.ndarray]:
    x = tg.tensor(sequence(3), requires_grad=True)
    layer.zero_grad()
    y, h = layer(x)
    (ops.square(y).sum() + h.sum()).backward()
    return [y.numpy(), h.numpy(), x.grad, *[p.grad for p in layer.parameters() if p.grad is not None]]


def plainly(layer: Any) -> list[np.ndarray]:
    with tg.eager():
        return outcome(layer)


def check_change(kind: Kind, known: bool, used: list[bool]) -> None:
    """The second call of a cell that keeps this is a known one, or is not, and the one after a change sees it."""
    layer = nn.Recurrent(Keeps(kind.make(), kind.read))
    before = outcome(layer)
    agree(outcome(layer), before)
    assert used == ([True] if known else []), "a known call, unless the content can change unseen"
    kind.change(layer.cell.kept)
    found = outcome(layer)
    agree(found, plainly(layer))
    assert not np.allclose(found[0], before[0])


@pytest.mark.parametrize("name", [*KINDS, *OPAQUE])
def test_a_change_of_what_is_kept_counts(name: str, used: list[bool]) -> None:
    check_change({**KINDS, **OPAQUE}[name], name in KINDS, used)


@pytest.mark.parametrize(
    "kept",
    [ops.tanh, np.tanh, np.dtype("f4"), Path("a"), Colour.RED, Settings, np, range(3), b"a", (1, 2), frozenset({1}),
     tg.Generator(0)],
    ids=lambda kept: type(kept).__name__,
)  # fmt: skip
def test_what_cannot_change_is_no_obstacle(kept: Any, used: list[bool]) -> None:
    layer = nn.Recurrent(Keeps(kept))
    agree(outcome(layer), plainly(layer))
    outcome(layer)
    assert used[-1] is True


class Parts(Keeps):
    """Parameters and modules in a list and a dict."""

    def __init__(self) -> None:
        super().__init__([nn.Parameter(np.full(H, 0.5)), nn.Linear(H, H, dtype=np.float64)])
        self.named = {"a": nn.Parameter(np.full(H, 0.25))}

    def factor(self) -> Any:
        scale, linear, *rest = self.kept
        return linear(scale) * self.named["a"] * (1.0 + len(rest))


def replaced_in_list(cell: Any) -> None:
    cell.kept[0] = nn.Parameter(np.full(H, -0.5))


def replaced_in_dict(cell: Any) -> None:
    cell.named["a"] = nn.Parameter(np.full(H, -0.5))


def changed_values(cell: Any) -> None:
    cell.kept[0].data = cell.kept[0].data * 2.0


def changed_module(cell: Any) -> None:
    cell.kept[1].weight = nn.Parameter(np.eye(H))


def another_module(cell: Any) -> None:
    cell.kept[1] = nn.Linear(H, H, bias=False, dtype=np.float64)


def longer(cell: Any) -> None:
    cell.kept.append(1)


@pytest.mark.parametrize(
    "change", [replaced_in_list, replaced_in_dict, changed_values, changed_module, another_module, longer]
)
def test_parts_in_lists_and_dicts(change: Callable[[Any], None], used: list[bool]) -> None:
    layer = nn.Recurrent(Parts())
    before = outcome(layer)
    outcome(layer)
    assert used == [True]
    change(layer.cell)
    found = outcome(layer)
    agree(found, plainly(layer))
    assert not np.allclose(found[0], before[0])


def test_gradients_with_respect_to_parts_record_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """tg.grad puts other tensors in the places of the parameters, also in those of lists."""
    recorded: list[Any] = []
    record = programs.record_body
    monkeypatch.setattr(programs, "record_body", lambda *args: (recorded.append(args), record(*args))[1])
    layer = nn.Recurrent(Parts())
    x = sequence(3)
    gradients = [tg.grad(lambda m: ops.square(m(x)[0]).sum())(layer) for _ in range(3)]
    assert len(recorded) == 1
    with tg.eager():
        expected = tg.grad(lambda m: ops.square(m(x)[0]).sum())(layer)
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[-1][name].numpy(), gradient.numpy(), rtol=1e-10, atol=1e-12)


class Own(Keeps):
    """Refers to itself, as a cell that chooses one of its methods does."""

    def __init__(self) -> None:
        super().__init__(Settings())
        self.kept.owner = self
        self.chosen = self.half
        self.closed = lambda: self.kept.scale

    def half(self, x: Any) -> Any:
        return x * 0.5

    def factor(self) -> Any:
        return self.chosen(1.0) * self.closed()


def test_a_cell_that_refers_to_itself_is_freed(used: list[bool]) -> None:
    layer = nn.Recurrent(Own())
    agree(outcome(layer), plainly(layer))
    outcome(layer)
    assert used[-1] is True
    layer.cell.kept.scale = 3.0
    agree(outcome(layer), plainly(layer))
    cell, weight = weakref.ref(layer.cell), weakref.ref(layer.cell.w)
    del layer
    gc.collect()
    assert cell() is None and weight() is None


def test_copies_know_no_calls() -> None:
    layer = nn.Recurrent(Keeps([0.5]))
    before = outcome(layer)
    outcome(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert programs.known_of(layer) and programs.known_of(other) is None
        agree(outcome(other), before)
