"""A cell that reads something outside of itself: what changed there counts at the next call."""

from __future__ import annotations

import types

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.compiler.draws import CompileWarning
from tinygrad_lstm.nn import programs

temperature = 1.0
settings = {"gain": 1.0}
config = types.ModuleType("config_of_a_user")
config.scale, config.part = 1.0, types.ModuleType("config_of_a_user.part")
config.part.shift = 0.0


class Base:
    rate = 1.0


class Options(Base):
    """Named by its class."""


def helper(z):
    return z * settings["gain"] * config.scale * Options.rate + config.part.shift


class Cell(nn.Module):
    slope = 1.0

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(np.full((3, 4), 0.3, np.float32))

    def initial_state(self, batch):
        return tg.asarray(np.zeros((batch, 4), np.float32))

    def forward(self, x, h):
        h = ops.tanh(helper(x @ self.w + h) * temperature * self.slope)
        return h, h


def change_global(monkeypatch):
    monkeypatch.setitem(globals(), "temperature", 0.5)


def change_dict(monkeypatch):
    monkeypatch.setitem(settings, "gain", 0.5)


def change_class(monkeypatch):
    monkeypatch.setattr(Cell, "slope", 0.5)


def change_module(monkeypatch):
    monkeypatch.setattr(config, "scale", 0.5)


def change_module_in_a_module(monkeypatch):
    monkeypatch.setattr(config.part, "shift", 0.5)


def change_another_class(monkeypatch):
    monkeypatch.setattr(Base, "rate", 0.5)


@pytest.mark.parametrize(
    "change",
    [change_global, change_dict, change_class, change_module, change_module_in_a_module, change_another_class],
)
@pytest.mark.parametrize("mode", ["never", "always"])
def test_what_a_cell_reads_outside_is_read_again(change, mode, monkeypatch):
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", mode)
    layer, x = nn.Recurrent(Cell()), np.ones((2, 3, 3), np.float32)
    before = layer(x)[0].numpy().copy()
    np.testing.assert_array_equal(layer(x)[0].numpy(), before)
    change(monkeypatch)
    after = layer(x)[0].numpy()
    with tg.eager():
        expected = layer(x)[0].numpy()
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(after, expected, rtol=1e-6)


def test_a_compiled_function_looks_at_the_globals_of_a_modules_forward(monkeypatch):
    layer, x = nn.Recurrent(Cell()), np.ones((2, 3, 3), np.float32)
    compiled = tg.compile(lambda x: layer(x)[0])
    before = compiled(x).numpy().copy()
    change_global(monkeypatch)
    after = compiled(x).numpy()
    assert np.abs(after - before).max() > 0.01
    with tg.eager():
        np.testing.assert_allclose(after, layer(x)[0].numpy(), rtol=1e-6)


class Holder(nn.Module):
    """Numbers in containers of its own, read by methods of every kind."""

    def __init__(self):
        super().__init__()
        self.numbers, self.nested, self.chosen = [np.float32(2.0)], ({"a": np.int64(2)},), {2.0}

    def initial_state(self, batch):
        return np.zeros((batch, 3), np.float32)

    @property
    def gain(self):
        return self.numbers[0] * self.nested[0]["a"] * sum(self.chosen)

    @staticmethod
    def shift():
        return settings["gain"]

    def forward(self, x, h):
        h = ops.tanh(x + h * 0.1) * self.gain + self.shift()
        return h, h


def change_number(cell, monkeypatch):
    cell.numbers[0] = np.float32(0.5)


def change_nested(cell, monkeypatch):
    cell.nested[0]["a"] = np.int64(3)


def change_set(cell, monkeypatch):
    cell.chosen.clear()
    cell.chosen.add(0.5)


def change_what_a_static_method_reads(cell, monkeypatch):
    monkeypatch.setitem(settings, "gain", np.float32(0.25))


@pytest.mark.parametrize("change", [change_number, change_nested, change_set, change_what_a_static_method_reads])
@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_in_containers_are_looked_at(change, compiled, monkeypatch):
    layer, x = nn.Recurrent(Holder()), np.full((4, 2, 3), 0.1, np.float32)
    run = tg.compile(lambda x: layer(x)[0]) if compiled else lambda x: layer(x)[0]
    before = [run(x).numpy().copy() for _ in range(3)]
    np.testing.assert_array_equal(before[0], before[2])
    change(layer.cell, monkeypatch)
    after = run(x).numpy()
    with tg.eager():
        expected = layer(x)[0].numpy()
    assert np.abs(after - before[0]).max() > 0.01
    np.testing.assert_allclose(after, expected, rtol=1e-6)


def test_values_of_a_parameter_that_the_cell_reads(monkeypatch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.w = nn.Parameter(np.array(2.0)), nn.Parameter(np.eye(2))

        def initial_state(self, batch):
            return np.zeros((batch, self.w.data.shape[0]))

        def forward(self, x, h):
            h = 0.5 * h + (x @ self.w) * float(self.scale) + np.zeros(self.w.data.shape[0])
            return h, h

    cell = Scaled()
    layer, x = nn.Recurrent(cell), np.ones((3, 1, 2))
    for value in (2.0, 3.0, 3.0, 4.0):
        cell.scale.data = np.array(value)
        with tg.eager():
            expected = layer(x)[0].tolist()
        assert layer(x)[0].tolist() == expected

    class Shaped(Scaled):
        def forward(self, x, h):
            h = 0.5 * h + x @ self.w * self.w.data.ndim
            return h, h

    recorded, record = [], programs.record_body
    monkeypatch.setattr(programs, "record_body", lambda *args: recorded.append(1) or record(*args))
    cell = Shaped()
    cell.w = nn.Parameter(np.eye(5))
    layer = nn.Recurrent(cell)
    for value in range(3):
        cell.w.data = value * np.eye(5)
        assert layer(np.ones((3, 1, 5)))[0].tolist()[0] == [[2.0 * value] * 5]
    with pytest.warns(CompileWarning, match=r"the body of Shaped was recorded 3 times more.*shape and dtype from it"):
        cell.w.data = 3 * np.eye(5)
        layer(np.ones((3, 1, 5)))
    cell.w.data = 4 * np.eye(5)
    assert layer(np.ones((3, 1, 5)))[0].tolist()[0] == [[8.0] * 5]
    assert len(recorded) == 5  # of whatever part of the values it made use


def test_a_parameter_without_a_number_is_recorded_once(monkeypatch):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.limit = nn.Parameter(np.array(np.nan))

        def initial_state(self, batch):
            return np.zeros((batch, 2))

        def forward(self, x, h):
            h = ops.tanh(x + h) if self.limit.item() > 0 else x + h
            return h, h

    recorded, record = [], programs.record_body
    monkeypatch.setattr(programs, "record_body", lambda *args: recorded.append(1) or record(*args))
    layer = nn.Recurrent(Branching())
    for _ in range(3):
        assert layer(np.ones((3, 1, 2)))[0].tolist() == [[[1.0, 1.0]], [[2.0, 2.0]], [[3.0, 3.0]]]
    assert len(recorded) == 1
