"""Native loops under threads: the same bits for any number of them, callers side by side, forks, slices of a launch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from native_cells import CASES, F, H, check, runs
from thread_parts import forked

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.compiler import native

__all__ = ["runs"]

Runs = list[bool]
PATIENCE = 120  # seconds until a child that hangs is killed
ROWS = 13
X = np.random.default_rng(3).standard_normal((6, ROWS, F))


@pytest.fixture(autouse=True)
def thread_count() -> Iterator[None]:
    before = tg.get_num_threads()
    yield
    tg.set_num_threads(before)


@pytest.fixture(scope="module")
def layer() -> Any:
    made = nn.LSTM(F, H, dtype=np.float64)
    generator = np.random.default_rng(4)
    for p in made.parameters():
        p.data = 0.5 * generator.standard_normal(p.shape)
    return made


def everything(layer: Any, x: np.ndarray = X) -> list[np.ndarray]:
    """Outputs, final state and all gradients; the layer's own ``grad`` stays as it is."""
    with tg.Tape() as tape:
        leaf = tg.tensor(x)
        y, (h, c) = layer(leaf)
        loss = ops.sin(y).sum() + (h * c).sum()
    return [t.numpy().copy() for t in (y, h, c, *tape.gradient(loss, [leaf, *layer.parameters()]))]


def assert_bits(found: Any, expected: Any) -> None:
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"number {k}")


# ---------------------------------------------------------------------------- one call, several threads


def test_the_bits_do_not_depend_on_the_number_of_threads(layer: Any, runs: Runs) -> None:
    tg.set_num_threads(1)
    expected = everything(layer)
    for count in (2, 3, 8, ROWS, 64, 1):
        tg.set_num_threads(count)
        assert_bits(everything(layer), expected)
    assert runs == [True] * 14


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [1, 17, 40])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_bits_in_float32(kind: Any, hidden: int, runs: Runs) -> None:
    tg.seed(0)
    layer = kind(5, hidden)
    for rows in (4, 7, 33):
        x = np.random.default_rng(rows).standard_normal((5, rows, 5)).astype(np.float32)

        def values(x: np.ndarray = x) -> list[np.ndarray]:
            layer.zero_grad()
            leaf = tg.tensor(x, requires_grad=True)
            y, _ = layer(leaf)
            ops.square(y).sum().backward()
            return [y.numpy().copy(), leaf.grad, *(p.grad for p in layer.parameters())]

        tg.set_num_threads(1)
        expected = values()
        for count in (2, 3, 8):
            tg.set_num_threads(count)
            assert_bits(values(), expected)
    assert all(runs) and len(runs) == 24


def test_a_row_does_not_depend_on_its_batch(layer: Any, runs: Runs) -> None:
    """A row alone, and among others: the same numbers up to rounding."""
    tg.set_num_threads(3)
    with tg.no_grad():
        whole = layer(X)[0].numpy()
        for rows in (1, 2, 5, 12):
            np.testing.assert_allclose(layer(X[:, :rows])[0].numpy(), whole[:, :rows], rtol=0, atol=1e-13)
    assert all(runs) and len(runs) == 5


@pytest.mark.parametrize("work", [1.0, 3000.0])
def test_a_launch_in_slices(work: float, layer: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code returns now and then, for signals: nothing changes."""
    expected = everything(layer)
    launches = []
    find = native.Frame.find_launch

    def watched(self: Any) -> Any:
        advance, *addresses = find(self)
        return (lambda *given: launches.append(given) or advance(*given)), *addresses

    monkeypatch.setattr(native.Frame, "find_launch", watched)
    forgotten = property(lambda self: None, lambda self, found: None)
    monkeypatch.setattr(native.Frame, "launch", forgotten, raising=False)
    monkeypatch.setattr(native, "SLICE", work)
    assert_bits(everything(layer), expected)
    assert len(launches) >= 6 and runs == [True] * 4


def test_sizes_that_change_between_calls(layer: Any, runs: Runs) -> None:
    """Scratch of a smaller batch, or of fewer threads, is not used for a larger one."""
    many = 300  # rows that need more scratch than its allocation is rounded up to
    x = np.random.default_rng(5).standard_normal((6, many, F))
    expected = {}
    tg.set_num_threads(1)
    for rows in (1, 2, 5, many):
        expected[rows] = everything(layer, x[:, :rows])
    for rows, count in ((many, 2), (1, 2), (5, 8), (2, 1), (many, 3), (5, 2), (many, 1), (1, 8), (many, 8)):
        tg.set_num_threads(count)
        assert_bits(everything(layer, x[:, :rows]), expected[rows])
    assert all(runs)


def test_rows_that_mix_are_not_shared_out(runs: Runs) -> None:
    tg.set_num_threads(4)
    check(CASES["batch_norm"], runs, rows=ROWS)
    assert runs == [False, False]


# ---------------------------------------------------------------------------- several callers


def side_by_side(actions: list[Callable[[], None]]) -> None:
    """Run in threads that start together; the first error is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(actions))

    def guarded(action: Callable[[], None]) -> None:
        try:
            start.wait()
            action()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("count", [1, 2])
def test_threads_share_a_layer(count: int, layer: Any, runs: Runs) -> None:
    """Each call has its own scratch, carry and residuals."""
    tg.set_num_threads(count)
    inputs = [X * scale for scale in (0.5, 1.0, 2.0, -1.0)]
    inputs[3] = inputs[3][:, :4]
    expected = [everything(layer, x) for x in inputs]

    def caller(k: int) -> Callable[[], None]:
        def action() -> None:
            for _ in range(12):
                assert_bits(everything(layer, inputs[k]), expected[k])

        return action

    side_by_side([caller(k) for k in range(len(inputs))])
    assert runs == [True] * (2 * 4 * 13)


def test_threads_meet_a_new_program(runs: Runs) -> None:
    """All of them compile at once: one form is made, and all get the same numbers."""
    scale = 0.371  # a constant that no other test uses
    found: list[np.ndarray] = []

    def action() -> None:
        body = lambda h, x: (ops.tanh(h * scale + x),) * 2
        found.append(ops.scan(body, np.zeros((ROWS, F)), X)[1].numpy())

    side_by_side([action] * 3)
    assert runs == [True] * 3
    assert_bits(found, [found[0]] * 3)


# ---------------------------------------------------------------------------- processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_fork_of_a_process_that_used_the_pool(meanwhile: bool, layer: Any, runs: Runs) -> None:
    """The child computes the same bits; with ``meanwhile`` another thread is in native code as it is made."""
    tg.set_num_threads(3)
    expected = everything(layer)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            everything(layer)

    other = threading.Thread(target=busy)
    if meanwhile:
        other.start()
    try:
        statuses = [forked(lambda: assert_bits(everything(layer), expected), PATIENCE) for _ in range(3)]
    finally:
        stop.set()
        if meanwhile:
            other.join()
    assert statuses == [0] * 3
    assert_bits(everything(layer), expected)
