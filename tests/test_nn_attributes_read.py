"""What a user's cell reads through its attributes: classes, slots, methods of C, arrays; every change counts."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_nn_attributes import Keeps, Kind, Settings, check_change, outcome, plainly
from test_nn_ready import H, agree, used

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops

__all__ = ["used"]

SCALE = [0.5]


class Classed:
    scale = 0.5

    def read(self) -> float:
        return SCALE[0]


class Wide(Classed):
    """Another scale."""

    scale = 0.3


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 0.5


class Both(Slotted):
    """An attribute in a slot, others in a dict."""


@dataclass(slots=True)
class Data:
    scale: float = 0.5


class Listed(list):
    scale = 0.5


class Named(dict):
    scale = 0.5


class Paired(tuple):
    scale = 0.5


class Looked:
    """Raises a KeyError for what it does not have."""

    def __init__(self) -> None:
        self.data = {"scale": 0.5}

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["data"][name]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5


class Fixed:
    """A descriptor."""

    value = 0.5

    def __get__(self, instance: Any, owner: Any) -> float:
        return self.value


class Described:
    scale = Fixed()


def function() -> Callable[[], float]:
    def made(factor: float = 0.5) -> float:
        return factor

    return made


def with_attribute() -> Any:
    def made() -> float:
        return found.scale

    found: Any = made
    found.scale = 0.5
    return found


def chain(length: int) -> Any:
    made: Any = None
    for _ in range(length):
        made = SimpleNamespace(scale=0.5, next=made)
    return made


def first(v: Any) -> Any:
    return next(iter(v))


def scale_of(v: Any) -> Any:
    return v.scale


def to_third(v: Any) -> None:
    v.scale = 0.3


def put_third(v: Any) -> None:
    v[0] = 0.3


KINDS = {
    "class attribute": Kind(Classed, scale_of, lambda v: setattr(Classed, "scale", 0.3)),
    "class": Kind(lambda: Classed, scale_of, lambda v: setattr(Classed, "scale", 0.3)),
    "global of a method": Kind(Classed, lambda v: v.read(), lambda v: put_third(SCALE)),
    "another class": Kind(Classed, scale_of, lambda v: setattr(v, "__class__", Wide)),
    "descriptor": Kind(Described, scale_of, lambda v: setattr(vars(Described)["scale"], "value", 0.3)),
    "slots": Kind(Slotted, scale_of, to_third),
    "slots and a dict": Kind(Both, scale_of, to_third),
    "dataclass with slots": Kind(Data, scale_of, to_third),
    "attribute of a list": Kind(lambda: Listed([1]), scale_of, to_third),
    "attribute of a dict": Kind(lambda: Named(a=1), scale_of, to_third),
    "attribute of a tuple": Kind(lambda: Paired([1]), scale_of, to_third),
    "attribute of a function": Kind(with_attribute, lambda v: v(), to_third),
    "errors of __getattr__": Kind(Looked, scale_of, lambda v: v.data.update(scale=0.3)),
    "object as a key": Kind(lambda: {Settings(): 1}, lambda v: first(v).scale, lambda v: to_third(first(v))),
    "module as a key": Kind(lambda: {Scaled(): 1}, lambda v: first(v).scale, lambda v: to_third(first(v))),
    "order of keys": Kind(
        lambda: {"a": 0.5, "b": 0.3}, lambda v: first(v.values()), lambda v: v.update(a=v.pop("a"))
    ),
    "moved to the end": Kind(
        lambda: OrderedDict(a=0.5, b=0.3), lambda v: first(v.values()), lambda v: v.move_to_end("a")
    ),
    "method of a dict": Kind(lambda: {"a": 0.5}.get, lambda v: v("a"), lambda v: v.__self__.update(a=0.3)),
    "method of a list": Kind(lambda: [0.5].count, lambda v: 0.5 * v(0.5), lambda v: v.__self__.append(0.5)),
    "defaults": Kind(function, lambda v: v(), lambda v: setattr(v, "__defaults__", (0.3,))),
    "code": Kind(function, lambda v: v(), lambda v: setattr(v, "__code__", (lambda factor: 0.3).__code__)),
    "array": Kind(lambda: np.array([0.5]), lambda v: float(v[0]), put_third),
    "array in a dict": Kind(lambda: {"a": np.full(H, 0.5)}, lambda v: v["a"].max(), lambda v: v["a"].fill(0.3)),
    "array in an object": Kind(
        lambda: SimpleNamespace(a=np.full(H, 0.5)), lambda v: float(v.a[0]), lambda v: v.a.fill(0.3)
    ),
    "no parameter": Kind(
        lambda: [nn.Parameter(np.ones(H))], lambda v: 0.3 if v[0] is None else 0.5, lambda v: v.__setitem__(0, None)
    ),
    "longer parameter": Kind(
        lambda: [nn.Parameter(np.ones(H))],
        lambda v: 0.1 * v[0].shape[0],
        lambda v: v.__setitem__(0, nn.Parameter(np.ones(H + 1))),
    ),
    "no tensor": Kind(
        lambda: SimpleNamespace(t=tg.tensor([1.0])),
        lambda v: 0.3 if v.t is None else 0.5,
        lambda v: setattr(v, "t", None),
    ),
}  # fmt: skip
OPAQUE = {
    "large array": Kind(lambda: np.full(100_000, 0.5), lambda v: float(v[0]), put_third),
    "long chain": Kind(lambda: chain(2000), lambda v: v.next.scale, lambda v: to_third(v.next)),
}


@pytest.fixture(autouse=True)
def restored() -> Any:
    """Classes and globals as they were."""
    yield
    Classed.scale, SCALE[0] = 0.5, 0.5
    vars(vars(Described)["scale"]).clear()


@pytest.mark.parametrize("name", [*KINDS, *OPAQUE])
def test_a_change_of_what_is_read_counts(name: str, used: list[bool]) -> None:
    check_change({**KINDS, **OPAQUE}[name], name in KINDS, used)


@pytest.mark.parametrize("name", [n for n in KINDS if "array" not in n and "tensor" not in n and "parameter" not in n])
def test_compiled_functions_see_it_too(name: str) -> None:
    kind = KINDS[name]
    kept = kind.make()
    x = np.ones(3)
    compiled = tg.compile(lambda x: ops.tanh(x) * kind.read(kept))
    np.testing.assert_allclose(compiled(x).numpy(), 0.5 * np.tanh(x))
    kind.change(kept)
    with tg.eager():
        expected = compiled(x).numpy()
    np.testing.assert_allclose(compiled(x).numpy(), expected)
    assert not np.allclose(expected, 0.5 * np.tanh(x))


def test_a_look_does_not_fill_in_what_is_missing() -> None:
    kept: Any = defaultdict(float, a=0.5)
    layer = nn.Recurrent(Keeps(kept, lambda v: sum(v.values())))
    outcome(layer)
    del kept["a"]
    kept["b"] = 0.3
    agree(outcome(layer), plainly(layer))
    assert list(kept) == ["b"]


def test_what_was_an_attribute_is_freed() -> None:
    layer = nn.Recurrent(Keeps([Settings()], lambda v: v[0].scale))
    outcome(layer)
    outcome(layer)
    before = weakref.ref(layer.cell.kept[0])
    layer.cell.kept = [Settings(0.3)]
    outcome(layer)
    outcome(layer)
    gc.collect()
    assert before() is None
