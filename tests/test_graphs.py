"""Random graphs against a naive reference: every value is recomputed by NumPy, every gradient by differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

import tinygrad_lstm as tg
from tinygrad_lstm import ops

SHAPES = [(), (3,), (1,), (2, 3), (2, 1)]  # all of them broadcast with each other

UNARY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "tanh": (ops.tanh, np.tanh),
    "sin": (ops.sin, np.sin),
    "sigmoid": (ops.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "square": (lambda t: ops.tanh(t) ** 2, lambda x: np.tanh(x) ** 2),
    "negative": (lambda t: -t, np.negative),
    "affine": (lambda t: 0.5 * t + 1.0, lambda x: 0.5 * x + 1.0),
    "sum": (lambda t: ops.tanh(t.sum()), lambda x: np.tanh(x.sum())),
    "mean": (lambda t: t.mean(axis=-1, keepdims=True) if t.ndim else t * 1.0,
             lambda x: x.mean(axis=-1, keepdims=True) if x.ndim else x * 1.0),
    "flip": (lambda t: ops.flip(t), lambda x: np.flip(x)),
    "softmax": (lambda t: ops.softmax(t) if t.ndim else t * 2.0,
                lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True) if x.ndim else x * 2.0),
    "first": (lambda t: t[..., 0] if t.ndim == 1 else t[:, :1] if t.ndim else t[()],
              lambda x: x[..., 0] if x.ndim == 1 else x[:, :1] if x.ndim else x[()]),
    "gather": (lambda t: t[[0, 0, t.shape[0] - 1]].sum(axis=0) if t.ndim else t + t,
               lambda x: x[[0, 0, x.shape[0] - 1]].sum(axis=0) if x.ndim else x + x),
    "gram": (lambda t: ops.tanh(t @ t.T) @ t if t.ndim == 2 else t * t,
    lambda x: np.tanh(x @ x.T) @ x if x.ndim == 2 else x * x),
    "turn": (lambda t: t.T.reshape(t.shape), lambda x: x.T.reshape(x.shape)),
    "joined": (lambda t: ops.concatenate([t, ops.sin(t)])[: t.shape[0]] if t.ndim else ops.stack([t, t]).sum(),
               lambda x: x if x.ndim else x + x),
    "checkpointed": (tg.checkpoint(lambda t: ops.sin(t) * t), lambda x: np.sin(x) * x),
}  # fmt: skip
BINARY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add": (lambda a, b: a + b, np.add),
    "subtract": (lambda a, b: a - b, np.subtract),
    "multiply": (lambda a, b: a * b, np.multiply),
    "divide": (lambda a, b: a / (2.0 + ops.sin(b)), lambda a, b: a / (2.0 + np.sin(b))),
    "mixed": (lambda a, b: ops.tanh(a) * b + a, lambda a, b: np.tanh(a) * b + a),
}


class Entry(NamedTuple):
    """One value of the reference: how NumPy computes it from earlier ones; ``frozen`` where no gradient passes."""

    function: Callable[..., Any] | None
    parents: tuple[int, ...]
    frozen: bool


class Node(NamedTuple):
    tensor: tg.Tensor
    index: int


class Graphs(RuleBasedStateMachine):
    nodes = Bundle("nodes")

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.values: list[np.ndarray] = []
        self.leaves: dict[int, tg.Tensor] = {}
        self.expected: dict[int, float] = {}  # accumulated directional derivative of what was differentiated, by leaf
        self.rng = np.random.default_rng(0)
        self.directions: dict[int, np.ndarray] = {}

    # ------------------------------------------------------------------ the naive reference

    def evaluate(self, moved: dict[int, np.ndarray]) -> list[np.ndarray]:
        values: list[np.ndarray] = []
        for k, (function, parents, frozen) in enumerate(self.entries):
            if k in moved:
                values.append(moved[k])
            elif function is None or frozen:
                values.append(self.values[k])
            else:
                values.append(np.asarray(function(*[values[p] for p in parents])))
        return values

    def slope(self, target: int, weight: np.ndarray, leaf: int) -> float:
        """The derivative of sum(weight * target) along the leaf's direction, by central differences."""
        h = 1e-5
        ends = []
        for sign in (1, -1):
            moved = {leaf: self.values[leaf] + sign * h * self.directions[leaf]}
            ends.append(float((weight * self.evaluate(moved)[target]).sum()))
        return (ends[0] - ends[1]) / (2 * h)

    def new(self, tensor: tg.Tensor, function: Any, parents: tuple[int, ...], frozen: bool = False) -> Node:
        self.entries.append(Entry(function, parents, frozen))
        value = tensor.numpy().copy() if function is None else np.asarray(function(*[self.values[p] for p in parents]))
        self.values.append(value)
        assert tensor.shape == value.shape
        np.testing.assert_allclose(tensor.tolist(), value, rtol=1e-12, atol=1e-12)
        return Node(tensor, len(self.entries) - 1)

    # ------------------------------------------------------------------ growing

    @rule(target=nodes, shape=st.sampled_from(SHAPES), requires_grad=st.booleans())
    def leaf(self, shape: tuple[int, ...], requires_grad: bool) -> Node:
        tensor = tg.tensor(self.rng.uniform(-1, 1, shape), requires_grad=requires_grad)
        node = self.new(tensor, None, ())
        if requires_grad:
            self.leaves[node.index] = tensor
            self.expected[node.index] = 0.0
            self.directions[node.index] = self.rng.uniform(-1, 1, shape)
        return node

    @rule(target=nodes, x=nodes, name=st.sampled_from(sorted(UNARY)))
    def unary(self, x: Node, name: str) -> Node:
        op, reference = UNARY[name]
        return self.new(op(x.tensor), reference, (x.index,))

    @rule(target=nodes, x=nodes, y=nodes, name=st.sampled_from(sorted(BINARY)))
    def binary(self, x: Node, y: Node, name: str) -> Node:
        op, reference = BINARY[name]
        return self.new(op(x.tensor, y.tensor), reference, (x.index, y.index))

    @rule(target=nodes, x=nodes)
    def split(self, x: Node) -> Any:
        if not x.tensor.ndim:
            return multiple()
        n = x.tensor.shape[-1]
        cut = n // 2
        a, b = ops.split(x.tensor, [cut], axis=-1)
        head = self.new(a.sum(axis=-1, keepdims=True), lambda v: v[..., :cut].sum(-1, keepdims=True), (x.index,))
        tail = self.new(b.sum(axis=-1, keepdims=True), lambda v: v[..., cut:].sum(-1, keepdims=True), (x.index,))
        return multiple(head, tail)

    @rule(target=nodes, x=nodes, how=st.sampled_from(["detach", "stop_gradient", "no_grad"]))
    def island(self, x: Node, how: str) -> Node:
        if how == "no_grad":
            with tg.no_grad():
                tensor = ops.sin(x.tensor)
            return self.new(tensor, np.sin, (x.index,), frozen=True)
        tensor = x.tensor.detach() if how == "detach" else ops.stop_gradient(x.tensor)
        return self.new(tensor, lambda v: v, (x.index,), frozen=True)

    @rule(target=nodes, x=nodes, y=nodes)
    def looped(self, x: Node, y: Node) -> Node:
        tensor, _ = ops.scan(lambda h, _: (ops.tanh(h * y.tensor.sum() + 0.1), None), x.tensor, None, length=3)

        def reference(h: np.ndarray, w: np.ndarray) -> np.ndarray:
            for _ in range(3):
                h = np.tanh(h * w.sum() + 0.1)
            return h

        return self.new(tensor, reference, (x.index, y.index))

    # ------------------------------------------------------------------ differentiating

    def weight(self, x: Node) -> np.ndarray:
        return np.cos(np.arange(x.tensor.size)).reshape(x.tensor.shape)

    @rule(x=nodes, times=st.integers(1, 2))
    def backward(self, x: Node, times: int) -> None:
        """Always with retain_graph: later rules go on from any value."""
        if not x.tensor.requires_grad:
            return
        for _ in range(times):
            x.tensor.backward(self.weight(x), retain_graph=True)
        for leaf in self.leaves:
            self.expected[leaf] += times * self.slope(x.index, self.weight(x), leaf)

    @rule(x=nodes)
    def forget(self, x: Node) -> None:
        for leaf, tensor in self.leaves.items():
            tensor.zero_grad()
            self.expected[leaf] = 0.0

    @rule(x=nodes, data=st.data())
    def second_order(self, x: Node, data: Any) -> None:
        """The gradient of a gradient along the direction, against differences of first gradients of a scalar copy."""
        if not self.leaves or not x.tensor.requires_grad:
            return
        leaf = data.draw(st.sampled_from(sorted(self.leaves)))
        w = self.weight(x)

        def scalar(value: tg.Tensor) -> tg.Tensor:
            return (self.replayed(leaf, value, x.index) * w).sum()

        g = tg.grad(scalar)(self.values[leaf])
        v = self.directions[leaf]
        slope = self.slope(x.index, w, leaf)
        np.testing.assert_allclose((g.numpy() * v).sum(), slope, rtol=1e-5, atol=1e-6)
        pushed = tg.jvp(scalar, (self.values[leaf],), (v,))[1].item()
        np.testing.assert_allclose(pushed, (g.numpy() * v).sum(), rtol=1e-9, atol=1e-11)
        forward = tg.hvp(scalar, (self.values[leaf],), (v,))[1][0].numpy()
        reverse = tg.grad(lambda t: (tg.grad(scalar)(t) * v).sum())(self.values[leaf]).numpy()
        np.testing.assert_allclose(forward, reverse, rtol=1e-8, atol=1e-10)

    def replayed(self, leaf: int, value: tg.Tensor, target: int) -> tg.Tensor:
        """The graph again, on ops, as a function of one leaf."""
        values: list[Any] = []
        for k, entry in enumerate(self.entries[: target + 1]):
            if k == leaf:
                values.append(value)
            elif entry.function is None or entry.frozen:
                values.append(tg.tensor(self.values[k]))
            else:
                values.append(self.again(entry, [values[p] for p in entry.parents]))
        return values[target]

    @staticmethod
    def again(entry: Entry, parents: list[Any]) -> tg.Tensor:
        for op, reference in (*UNARY.values(), *BINARY.values()):
            if reference is entry.function:
                return op(*parents)
        return entry.function(*[AsNumPy(p) if isinstance(p, tg.Tensor) else p for p in parents]).tensor  # type: ignore

    @invariant()
    def gradients_are_right(self) -> None:
        for leaf, tensor in self.leaves.items():
            found = 0.0 if tensor.grad is None else float((tensor.grad * self.directions[leaf]).sum())
            assert tensor.grad is None or tensor.grad.shape == tensor.shape
            np.testing.assert_allclose(found, self.expected[leaf], rtol=1e-5, atol=1e-6)

    @invariant()
    def leaves_are_unchanged(self) -> None:
        for leaf, tensor in self.leaves.items():
            np.testing.assert_array_equal(tensor.tolist(), self.values[leaf])


class AsNumPy:
    """Lets the few references that are closures (split, loop) run on tensors."""

    def __init__(self, tensor: tg.Tensor) -> None:
        self.tensor = tensor

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> AsNumPy:
        return AsNumPy(ufunc(*[i.tensor if isinstance(i, AsNumPy) else i for i in inputs]))

    def __getitem__(self, index: Any) -> AsNumPy:
        return AsNumPy(self.tensor[index])

    def __mul__(self, other: Any) -> AsNumPy:
        return AsNumPy(self.tensor * (other.tensor if isinstance(other, AsNumPy) else other))

    def __add__(self, other: Any) -> AsNumPy:
        return AsNumPy(self.tensor + other)

    def sum(self, axis: Any = None, keepdims: bool = False) -> AsNumPy:
        return AsNumPy(self.tensor.sum(axis, keepdims))


Graphs.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestGraphs = Graphs.TestCase
