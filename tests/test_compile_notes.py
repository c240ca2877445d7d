"""tg.compile: random numbers; the warning; tg.explain."""

from __future__ import annotations

import random
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from test_compile_errors import X, refused

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.compiler import report
from tinygrad_lstm.compiler.recording import MANY_RECORDS, CompileWarning, Entry
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.random import default_generator
from tinygrad_lstm.tape import state

# ---------------------------------------------------------------------------- random numbers


def test_drawing_outside_of_ops_is_refused_before_anything_is_drawn() -> None:
    generator = tg.Generator(3)
    before = generator.get_state()

    def f(x: Any) -> Any:
        return x * generator.uniform(size=2)  # here

    refused(f, X)
    assert generator.get_state() == before


def test_seeding_is_refused_before_it_happens() -> None:
    before = default_generator().get_state()

    def f(x: Any) -> Any:
        tg.seed(3)  # here
        return ops.dropout(x, 0.5)

    assert "seed outside" in refused(f, X)
    assert default_generator().get_state() == before


@pytest.mark.parametrize("draw", [lambda: np.random.rand(), lambda: random.random()])  # noqa: NPY002
def test_draws_from_shared_generators_are_warned_of(draw: Any) -> None:
    state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with pytest.warns(CompileWarning, match="drawn with numpy.random or random"):
        tg.compile(lambda x: x * draw())(np.ones(3))
    np.random.set_state(state[0])  # noqa: NPY002
    random.setstate(state[1])


def test_what_the_recording_draws_is_drawn_anew_at_each_call() -> None:
    generator = tg.Generator(3)

    def noise(shape: tuple[int, ...]) -> Any:
        recorder = state().trace
        if recorder is None:
            return tg.asarray(generator.normal(size=shape))
        return recorder.draw(Aval(shape, np.dtype(np.float64)), lambda: generator.normal(size=shape))

    def f(x: Any) -> Any:
        return x * noise((2,)) + noise((1,))

    fast = tg.compile(f)
    start = generator.get_state()
    expected = [f(X).tolist() for _ in range(4)]
    generator.set_state(start)
    assert [fast(X).tolist() for _ in range(4)] == expected
    # The backward pass sees the numbers of its own forward pass.
    for _ in range(2):
        x = tg.tensor(X.astype(np.float64), requires_grad=True)
        at = generator.get_state()
        out = fast(x)
        fast(x)
        ops.sum(out).backward()
        generator.set_state(at)
        assert x.grad.tolist() == generator.normal(size=2).tolist()


# ---------------------------------------------------------------------------- the warning, and explain


def test_an_unrolled_loop_is_warned_about() -> None:
    def unrolled(x: Any) -> Any:
        for _ in range(1001):
            x = x * 1.5 - x
        return x

    fast = tg.compile(unrolled)
    with pytest.warns(CompileWarning, match=r"2002 operations.*ops\.scan") as caught:
        fast(X)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(X)


@pytest.mark.filterwarnings("error")
def test_derivatives_of_layers_are_no_unrolled_loops() -> None:
    """They are recorded op by op, and there are many of them; nothing in the function could be written better."""
    layer = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    x = np.linspace(-1, 1, 36, dtype=np.float32).reshape(6, 2, 3)
    recorded = []
    fast = tg.compile(tg.hessian(lambda x: ops.sum(ops.square(layer(x)[0]))))
    init = Entry.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Entry, "__init__", lambda self, name, program, n, *rest: (
            recorded.append(n), init(self, name, program, n, *rest))[1])  # fmt: skip
        assert fast(x).shape == (6, 2, 3, 6, 2, 3)
    assert recorded[0] > MANY_RECORDS


def test_an_unrolled_loop_below_a_gradient_is_warned_about() -> None:
    cell = nn.GRUCell(2, 3)

    def loss(m: Any, x: Any) -> Any:
        h = m.initial_state(x.shape[1])
        for t in range(x.shape[0]):
            _, h = m(x[t], h)
        return ops.sum(h)

    with pytest.warns(CompileWarning, match=r"ops\.scan"):
        tg.compile(tg.grad(loss))(cell, np.ones((60, 1, 2), np.float32))


def test_explain_shows_the_last_compiled_call_of_this_thread() -> None:
    first, second = tg.compile(lambda x: ops.tanh(x) * 2.0), tg.compile(lambda x: ops.exp(-x))
    first(X)
    second(X)
    assert tg.explain().fused == ("negative, exp -> float32[2]",)
    first(X)
    assert tg.explain().fused == first.explain().fused == ("tanh, multiply -> float32[2]",)
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(tg.explain()))
    thread.start()
    thread.join()
    assert "nothing was compiled yet" in seen[0].title


def test_reports_are_made_when_somebody_looks() -> None:
    made: list[int] = []

    def source() -> report.Report:
        made.append(1)
        return report.Report("a call", notes=["done"], parts=[report.Report("inside", fused=["a, b"])])

    report.publish(source)
    assert not made
    assert str(tg.explain()) == "a call\n  notes\n    done\n  inside\n    fused\n      a, b"
    assert tg.explain() is tg.explain() and len(made) == 1
    with report.collected() as parts:
        report.publish(source)
    assert parts == [source] and tg.explain().title == "a call"
    with pytest.raises(AttributeError):
        tg.explain().title = "other"  # type: ignore[misc]


def test_the_report_of_a_body_that_needs_values() -> None:
    text = str(report.stepwise(tg.TraceError("the value of a tensor is needed (model.py:3)"), 7))
    assert "scan of 7 steps: not compiled" in text and "model.py:3" in text
