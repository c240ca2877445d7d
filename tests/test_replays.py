"""Known replays give the bits of the general one, and leave to it whatever is out of the ordinary."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import SAMPLES, Sample
from test_graphs import BINARY, SHAPES, UNARY

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops, replays

LEAVES: Any = sys.modules["tinygrad_lstm.leaves"]


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    replays._places.clear()
    yield
    replays._places.clear()


class Counter:
    def __init__(self) -> None:
        self.general = 0


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How many general replays ran."""
    counter, replay = Counter(), LEAVES.replay

    def counted(*args: Any, **kwargs: Any) -> Any:
        counter.general += 1
        return replay(*args, **kwargs)

    monkeypatch.setattr(LEAVES, "replay", counted)
    return counter


def gradients(loss: Callable[..., Any], leaves: list[tg.Tensor], **options: Any) -> list[np.ndarray]:
    for leaf in leaves:
        leaf.grad = None
    loss(*leaves).backward(**options)
    return [np.zeros(0) if leaf.grad is None else leaf.grad.copy() for leaf in leaves]


def generally(loss: Callable[..., Any], leaves: list[tg.Tensor]) -> list[np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LEAVES, "known_replay", lambda *args: False)
        return gradients(loss, leaves)


def check(loss: Callable[..., Any], leaves: list[tg.Tensor], counter: Counter, times: int = 6) -> None:
    """The last of some backwards are known, and all are as the general one."""
    for k in range(times):
        for leaf in leaves:
            leaf.data = leaf.numpy() * 0.93
        expected = generally(loss, leaves)
        before = counter.general
        found = gradients(loss, leaves)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
        if k >= times - 2:
            assert counter.general == before, "the general replay ran"


CASES = [
    pytest.param(name, s, id=f"{name}-{k}")
    for name, samples in sorted(SAMPLES.items())
    for k, s in enumerate(samples)
    if tg.REGISTRY[name].differentiable and s.floats()
]


@pytest.mark.parametrize(("name", "sample"), CASES)
def test_every_primitive(name: str, sample: Sample, counter: Counter) -> None:
    function, chosen = sample.squared(name), sample.floats()

    def loss(*leaves: Any) -> Any:
        args = list(sample.args)
        for k, leaf in zip(chosen, leaves, strict=True):
            args[k] = leaf
        total = None
        for t in function(*args):
            total = t.sum() if total is None else total + t.sum()
        return total

    leaves = [tg.tensor(sample.args[k], requires_grad=True) for k in chosen]
    if not loss(*leaves).requires_grad:
        pytest.skip("no gradient flows through this sample")  # integers and steps
    for _ in range(6):
        expected = generally(loss, leaves)
        before = counter.general
        found = gradients(loss, leaves)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
    assert name == "checkpoint" or counter.general == before, "the general replay ran"


@st.composite
def graphs(draw: Any) -> Any:
    """A function of some leaves: a random chain of operations, each on earlier values."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    steps = []
    for k in range(draw(st.integers(1, 8))):
        count = len(shapes) + k
        pick = st.integers(0, count - 1)
        if draw(st.booleans()):
            steps.append((UNARY[draw(st.sampled_from(sorted(UNARY)))][0], draw(pick)))
        else:
            steps.append((BINARY[draw(st.sampled_from(sorted(BINARY)))][0], draw(pick), draw(pick)))

    def loss(*leaves: Any) -> Any:
        values = list(leaves)
        for op, *places in steps:
            values.append(op(*[values[p] for p in places]))
        total = None
        for value in values[len(leaves) :]:
            part = (value * value).sum()
            total = part if total is None else total + part
        return total

    return shapes, loss


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_random_graphs(graph: Any) -> None:
    replays._places.clear()
    shapes, loss = graph
    rng = np.random.default_rng(3)
    leaves = [tg.tensor(rng.uniform(-1, 1, shape), requires_grad=True) for shape in shapes]
    for _ in range(5):
        for leaf in leaves:
            leaf.data = rng.uniform(-1, 1, leaf.shape)
        expected = generally(loss, leaves)
        for a, b in zip(gradients(loss, leaves), expected, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers", [1, 2])
def test_layers(kind: Any, layers: int, counter: Counter, rng: Any) -> None:
    layer = kind(3, 5, layers)
    x = tg.tensor(rng.standard_normal((4, 2, 3)).astype(np.float32), requires_grad=True)
    check(lambda *leaves: (layer(leaves[0])[0] ** 2).sum(), [x, *layer.parameters()], counter)


def test_a_final_state_and_outputs(counter: Counter, rng: Any) -> None:
    layer = nn.LSTM(3, 5)
    x = tg.tensor(rng.standard_normal((4, 2, 3)).astype(np.float32))

    def loss(*leaves: Any) -> Any:
        y, (h, c) = layer(x)
        return (y * y).sum() + (h * c).sum()

    check(loss, list(layer.parameters()), counter)


def test_training_with_an_embedding(counter: Counter, rng: Any) -> None:
    """Slices go into the cotangent of the whole; optimizers change what was saved by earlier records."""
    table, layer, head = nn.Embedding(7, 3), nn.LSTM(3, 5), nn.Linear(5, 7)
    parameters = [*table.parameters(), *layer.parameters(), *head.parameters()]
    twins = [tg.tensor(p.numpy(), requires_grad=True) for p in parameters]
    optimizer = tg.optim.SGD(parameters, lr=0.1)
    ids, targets = rng.integers(0, 7, (4, 2)), rng.integers(0, 7, (4, 2))

    def loss(*_: Any) -> Any:
        both = table(ids) + table(targets)
        return nn.cross_entropy(head(layer(both)[0]), targets)

    for _ in range(6):
        expected = generally(loss, parameters)
        before = counter.general
        for a, b in zip(gradients(loss, parameters), expected, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
        optimizer.step()
    assert counter.general == before
    assert all((t.numpy() != p.numpy()).any() for t, p in zip(twins, parameters, strict=True))


TWICE: dict[str, Callable[..., Any]] = {
    "x * x": lambda x, y: (x * x).sum(),
    "first of several": lambda x, y: ((x * x) + ops.sin(x) + y).sum(),
    "last of several": lambda x, y: (ops.sin(x) + x * x * 0.3).sum(),
    "computed": lambda x, y: (ops.tanh(x) * ops.tanh(x)).sum() + ((z := x * y) * z).sum(),
    "of several outputs": lambda x, y: ((z := ops.split(x, 2, axis=0)[1]) * z).sum(),
    "no sum of its own": lambda x, y: (x + x).sum() + ops.maximum(y, y).sum(),
    "0-d": lambda x, y: (z := x.sum()) * z,
    "a quotient": lambda x, y: (y / y).sum(),
}


@pytest.mark.parametrize("name", TWICE)
def test_both_operands_are_one(name: str, counter: Counter, rng: np.random.Generator) -> None:
    leaves = [tg.tensor(rng.standard_normal((4, 3)), requires_grad=True) for _ in range(2)]
    check(TWICE[name], leaves, counter)


def test_operands_that_were_one(counter: Counter, rng: np.random.Generator) -> None:
    """The form with one share is not taken for two tensors with the same past."""
    x, values = tg.tensor(rng.standard_normal(5), requires_grad=True), rng.standard_normal(5)

    def loss(x: tg.Tensor, other: bool = False) -> tg.Tensor:
        y = ops.sin(x)
        z = y
        if other:
            z = tg.tensor(values)
            z._node, z._rg = y._node, True  # another value of the same node
        return (y * z).sum()

    check(loss, [x], counter)
    check(lambda x: loss(x, True), [x], counter)
    check(loss, [x], counter, times=2)


def test_only_what_nobody_else_holds_is_doubled_in_place() -> None:
    share = np.ones(3)
    view = share[:]
    for array in (share, view):
        assert replays._doubled(array).tolist() == [2.0] * 3
    assert share.tolist() == [1.0] * 3 and view.base is share
