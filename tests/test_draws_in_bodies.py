"""Numbers that the body of a loop draws itself: recorded once, they would be the same at every step."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.compiler.draws import CompileWarning

own = np.random.default_rng(0)
X = np.ones((6, 2, 3), np.float32)
DRAWS = {
    "numpy.random": lambda: np.random.normal(),  # noqa: NPY002
    "random": random.random,
    "default_rng": lambda: own.normal(),
}


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw, self.w = draw, nn.Parameter(np.ones((3, 3), np.float32))

    def initial_state(self, batch):
        return np.zeros((batch, 3), np.float32)

    def forward(self, x, h):
        h = ops.tanh(x @ self.w + h) + float(self.draw())
        return h, h


def total(draw, x=X):
    return ops.scan(lambda carry, row: (carry + row * float(draw()), None), np.zeros((2, 3), np.float32), x)[0]


@pytest.mark.parametrize("name", ["numpy.random", "random", "default_rng"])
def test_a_recorded_body_that_draws_is_warned_of_at_the_users_line(name):
    draw = DRAWS[name]
    for run in (lambda: total(draw), lambda: nn.Recurrent(Noisy(draw))(X)):
        with pytest.warns(CompileWarning, match="every step sees the same ones: draw them before the loop") as caught:
            run()
        assert [warning.filename for warning in caught] == [__file__]


def test_compiled_functions_that_draw_from_a_generator_of_their_own():
    with pytest.warns(CompileWarning, match="every later call sees the same ones"):
        tg.compile(lambda x: x * float(own.normal()))(X)


class Sampler:
    """A user's object that holds a generator."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, x):
        return x * float(self.generator.normal())


def _holding(kind):
    sampler = Sampler()
    return {
        "method": sampler.__call__, "object": sampler, "closure": lambda x: sampler(x),
        "partial": functools.partial(lambda own, x: x * float(own.normal()), sampler.generator),
        "default": lambda x, own=sampler.generator: x * float(own.normal()),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["method", "object", "closure", "partial", "default"])
def test_wherever_the_generator_is_held(kind):
    f = _holding(kind)
    with pytest.warns(CompileWarning, match="every later call"):
        tg.compile(f)(X)
    with pytest.warns(CompileWarning, match="every step"):
        ops.scan(lambda carry, row: (carry + f(row), None), np.zeros((2, 3), np.float32), X)


class Helped(Noisy):
    """A cell that leaves the draw to something of its own."""

    held = np.random.default_rng(1)

    def __init__(self, kind):
        super().__init__(None)
        self.kind, self.part = kind, Part()

    def sampled(self):
        return own.normal()

    @staticmethod
    def drawn():
        return Numbers.another()

    def forward(self, x, h):
        draw = {
            "helper": lambda: self.sampled(), "static": lambda: self.drawn(), "class": lambda: self.held.normal(),
            "part": lambda: self.part.sampled(),
        }[self.kind]  # fmt: skip
        h = ops.tanh(x @ self.w + h) + float(draw())
        return h, h


class Numbers:
    """A name space."""

    generator = np.random.default_rng(2)

    @staticmethod
    def another():
        return Numbers.generator.normal()


class Part(nn.Module):
    def sampled(self):
        return own.normal()

    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", ["helper", "static", "class", "part"])
def test_whichever_method_draws(kind):
    with pytest.warns(CompileWarning, match="every step sees the same ones") as caught:
        nn.Recurrent(Helped(kind))(X)
    assert len(caught) == 1


def test_one_warning_for_loops_inside_of_a_recording():
    draw = DRAWS["numpy.random"]

    def outer(carry, row):
        return carry + total(draw, ops.stack([row, row])), None

    for run in (
        lambda: ops.scan(outer, np.zeros((2, 3), np.float32), X),
        lambda: tg.compile(lambda x: total(draw, x))(X),
    ):
        with pytest.warns(CompileWarning) as caught:
            run()
        assert len(caught) == 1


def test_a_body_that_runs_step_by_step_draws_anew_in_silence():
    with tg.eager():
        ys = ops.scan(lambda c, x: (c, x + np.random.normal()), 0.0, np.zeros(5))[1]  # noqa: NPY002
        assert len(set(ys.tolist())) == 5

    def body(carry, x):
        return (carry + 1.0 if float(carry) >= 0 else carry), x + np.random.normal()  # noqa: NPY002

    assert len(set(ops.scan(body, 0.0, np.zeros(5))[1].tolist())) == 5


def test_a_generator_of_this_package_is_drawn_from_at_every_step():
    generator, again = tg.Generator(3), tg.Generator(3)
    ys = ops.scan(lambda c, x: (c, x + generator.normal(size=())), 0.0, np.zeros(5))[1]
    assert ys.tolist() == [float(again.normal()) for _ in range(5)]
    assert "random numbers were drawn" in str(tg.explain())


def test_draws_before_the_loop_are_nobodys_concern():
    noise = np.random.normal(size=(6, 2, 3)).astype(np.float32)  # noqa: NPY002
    ops.scan(lambda carry, row: (carry + row, None), np.zeros((2, 3), np.float32), noise)
    nn.Recurrent(nn.Zoneout(nn.LSTMCell(3, 4)))(X)
