"""Long chains, memory that is freed, and what is (not) kept for the backward pass."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.kernels import pool

STEPS = 100_000


def chain(x: Any, steps: int) -> Any:
    for _ in range(steps):
        x = x * 0.999999 + 1e-7
    return x


@pytest.fixture
def no_gc():
    """Reference counts alone must free everything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_backward_through_a_hundred_thousand_steps(no_gc):
    x = tg.tensor(np.array(0.5), requires_grad=True)
    y = chain(x, STEPS // 2)  # two records a step
    first = weakref.ref(y._node)
    y.backward()
    np.testing.assert_allclose(x.grad, 0.999999 ** (STEPS // 2), rtol=1e-9)
    del y
    assert first() is None


def test_a_hundred_thousand_steps_without_backward_are_freed_without_recursion(no_gc):
    x = tg.tensor(np.array(0.5), requires_grad=True)
    h = x * 1.0
    first = weakref.ref(h._node)
    h = chain(h, STEPS // 2)
    assert first() is not None
    del h
    assert first() is None


@pytest.mark.slow
def test_grad_and_tape_through_many_steps():
    assert tg.grad(lambda t: chain(t, STEPS // 4))(np.array(0.5)).item() == pytest.approx(0.999999 ** (STEPS // 4))
    x = tg.tensor(np.array(0.5))
    with tg.Tape() as tape:
        y = chain(x, STEPS // 4)
    assert tape.gradient(y, x).item() == pytest.approx(0.999999 ** (STEPS // 4))
    del tape, y
    assert tg.jvp(lambda t: chain(t, STEPS // 4), (np.array(0.5),), (1.0,))[1].item() > 0.9


def test_slices_of_a_long_sequence_cost_linear_memory():
    """T slices of (T, n) accumulate into one buffer, not into T buffers of the whole."""
    x = tg.tensor(np.ones((2000, 64)), requires_grad=True)
    total = x[0]
    for t in range(1, 2000):
        total = total + x[t]
    tracemalloc.start()
    total.sum().backward()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (x.grad == 1.0).all()
    assert peak < 6 * x.grad.nbytes


def flat(work: Any, times: int, warm: int = 20) -> None:
    """Memory after ``times`` runs is what it was after a few, and no run leaves a cycle to the collector."""
    for _ in range(warm):
        work()
    gc.collect()
    gc.disable()
    try:
        tracemalloc.start()
        work()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(times):
            work()
        cycles = gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert after - before < 10_000, f"{after - before} bytes more after {times} runs"
    assert cycles == 0, f"{cycles} objects in cycles after {times} runs"


X = np.ones((50, 20))
LEAF = tg.tensor(X, requires_grad=True)
WEIGHTS = tg.tensor(np.eye(20), requires_grad=True)


def forward() -> Any:
    return (ops.tanh(LEAF @ WEIGHTS) * ops.softmax(LEAF)).sum()


def train() -> None:
    LEAF.zero_grad()
    WEIGHTS.zero_grad()
    forward().backward()


def on_tape() -> None:
    with tg.Tape() as tape:
        y = forward()
    tape.gradient(y, LEAF)


def hooked() -> None:
    y = LEAF * 2.0
    y.retain_grad()
    y.register_hook(lambda g: g * 1.0)
    y.sum().backward()


def failing() -> None:
    y = LEAF * 2.0
    y.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()


SCAN = lambda h, x: (ops.tanh(h * WEIGHTS[0] + x),) * 2
WORK = {
    "forward": forward, "backward": train, "tape": on_tape, "hooks": hooked,
    "grad": lambda: tg.grad(lambda x: (ops.tanh(x) * x).sum())(X),
    "nested grad": lambda: tg.grad(lambda x: tg.grad(lambda y: (y * y * y).sum())(x).sum())(X),
    "jvp": lambda: tg.jvp(lambda x: ops.tanh(x) * x, (X,), (X,)),
    "hvp": lambda: tg.hvp(lambda x: (ops.tanh(x) * x).sum(), (X,), (X,)),
    "vjp": lambda: tg.vjp(lambda x: ops.tanh(x) * x, X)[1](X),
    "checkpoint": lambda: tg.checkpoint(lambda x: ops.tanh(x) * x)(LEAF).sum().backward(),
    "scan forward": lambda: ops.scan(SCAN, X[0], LEAF), "scan backward": lambda: ops.scan(SCAN, X[0],
    LEAF)[1].sum().backward(),
    "split": lambda: sum(p.sum() for p in ops.split(LEAF, 2)).backward(),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_memory_is_flat(name):
    flat(WORK[name], 1000 if name == "forward" else 100)


def test_memory_is_flat_when_backward_fails():
    for _ in range(10):
        failing()
    gc.collect()
    tracemalloc.start()
    for _ in range(50):
        failing()
    gc.collect()  # a traceback refers to its frames: cycles are Python's own here
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 60_000


# ---------------------------------------------------------------------------- what a record keeps

NOTHING = {
    "add": lambda x, y: x + y, "subtract": lambda x, y: x - y, "negative": lambda x, y: -x, "sum": lambda x,
    y: x.sum(axis=0),
    "mean": lambda x, y: x.mean(axis=0), "reshape": lambda x, y: x.reshape(-1) + 0.0, "concatenate": lambda x,
    y: ops.concatenate([x, y]),
    "stack": lambda x, y: ops.stack([x, y]), "broadcast": lambda x, y: ops.broadcast_to(x, (2, 100, 100)).sum(axis=0),
    "slice": lambda x, y: x[1:] + 0.0, "where": lambda x, y: ops.where(np.array(True), x, y),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_linear_ops_keep_no_operand(name):
    x = tg.tensor(np.ones((100, 100)), requires_grad=True) * 1.0
    y = tg.tensor(np.ones((100, 100)), requires_grad=True) * 1.0
    seen = [weakref.ref(x), weakref.ref(y)]
    out = NOTHING[name](x, y)
    del x, y
    assert [s() for s in seen] == [None, None]
    out.sum().backward()


def test_nonlinear_ops_keep_what_their_rules_name():
    x = tg.tensor(np.ones(10), requires_grad=True) * 1.0
    y = tg.tensor(np.ones(10)) * 1.0
    seen_x, seen_y = weakref.ref(x), weakref.ref(y)
    product = x * y
    del y
    assert seen_y() is not None
    del x
    product.sum().backward()
    assert seen_x() is seen_y() is None
    t = tg.tensor(np.ones(10), requires_grad=True) * 1.0
    seen_t = weakref.ref(t)
    out = ops.tanh(t)
    del t
    assert seen_t() is None  # tanh needs its output only
    out.sum().backward()


@pytest.mark.parametrize("other", [3.0, tg.tensor(np.ones(10))], ids=["number", "constant"])
def test_an_operand_is_not_kept_for_one_that_needs_no_gradient(other):
    x = tg.tensor(np.ones(10), requires_grad=True) * 1.0
    seen = weakref.ref(x)
    out = x * other
    del x
    assert seen() is None
    out.sum().backward()


def test_backward_frees_as_it_goes():
    x = tg.tensor(np.ones(200_000), requires_grad=True)
    y = x
    for _ in range(10):
        y = ops.sin(y)
    tracemalloc.start()
    y.sum().backward()
    pool.clear()  # what lies ready for the next call is nobody's
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 2 * x.data.nbytes
    assert y._node.saved is None


def test_no_grad_keeps_nothing():
    x = tg.tensor(np.ones(10), requires_grad=True)
    with tg.no_grad():
        h = ops.sin(x)
        seen = weakref.ref(h)
        y = ops.sin(h)
        del h
    assert seen() is None
    assert not y.requires_grad


def test_a_released_record_keeps_no_output_that_was_looked_at(no_gc):
    """The other outputs of its primitive may live on."""
    h0 = tg.tensor(np.ones((2, 3)), requires_grad=True)
    final, ys = ops.scan(lambda h, x: (ops.tanh(h + x),) * 2, h0, np.ones((4, 2, 3)))
    gone = weakref.ref(ys.data)  # what the record saved lies in it
    del ys
    final.sum().backward()
    assert gone() is None and final.shape == (2, 3)
