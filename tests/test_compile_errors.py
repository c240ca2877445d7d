"""What tg.compile refuses, with the line of the user's code."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops, optim
from tinygrad_lstm.compiler import reach
from tinygrad_lstm.tape import state

X = np.float32([0.5, 1.5])
LIST: list[Any] = []
DICT: dict[str, Any] = {}
TOTAL: Any = 0.0


def line_of(f: Callable[..., Any], mark: str = "# here") -> str:
    """``file:line`` of the line of a function that carries the mark."""
    code = f.__code__
    with open(code.co_filename, encoding="utf-8") as file:
        lines = file.read().splitlines()
    for number in range(code.co_firstlineno, len(lines) + 1):
        if mark in lines[number - 1]:
            return f"{code.co_filename}:{number}"
    raise AssertionError("no such line")


def refused(f: Callable[..., Any], *args: Any, where: Any = None) -> str:
    """The message of the TraceError at the first call, which must name the marked line; no state is left behind."""
    before = state()
    with pytest.raises(tg.TraceError) as caught:
        tg.compile(f)(*args)
    message = str(caught.value)
    expected = line_of(where or f)
    assert expected in message, f"{expected} is not in: {message}"
    assert state() is before
    return message


# ---------------------------------------------------------------------------- values


def asks_if(x: Any) -> Any:
    y = x * 2.0
    if y[0] > 0.0:  # here
        return y
    return -y


def asks_float(x: Any) -> Any:
    y = ops.sum(x)
    return x * float(y)  # here


def asks_item(x: Any) -> Any:
    return x / ops.max(x).item()  # here


def asks_array(x: Any) -> Any:
    y = x + 1.0
    return np.asarray(y) * 2.0  # here


def asks_numpy(x: Any) -> Any:
    return x + (x * 2.0).numpy()  # here


def asks_mask(x: Any) -> Any:
    return ops.sum(x[x > 1.0])  # here


def helper_that_asks(x: Any) -> Any:
    return bool(ops.sum(x) > 0.0)  # here


def asks_in_helper(x: Any) -> Any:
    return x if helper_that_asks(x) else -x


def asks_in_scan(x: Any) -> Any:
    def body(h: Any, t: Any) -> Any:
        return (h + t if t > 0.0 else h), None  # here

    return ops.scan(body, x[0], x)[0]


@pytest.mark.parametrize("f", [asks_if, asks_float, asks_item, asks_array, asks_numpy, asks_mask, asks_in_scan])
def test_values(f: Any) -> None:
    assert f.__name__ in refused(f, X)
    f(tg.tensor(X))  # the plain function takes it


def test_values_asked_for_in_another_function() -> None:
    refused(asks_in_helper, X, where=helper_that_asks)


# ---------------------------------------------------------------------------- gradients and steps


def test_backward() -> None:
    model = nn.Linear(2, 1)

    def of_a_parameter(x: Any) -> Any:
        loss = ops.sum(model(x))
        loss.backward()  # here
        return loss

    assert "value_and_grad" in refused(of_a_parameter, X)

    def of_an_argument(x: Any) -> Any:
        loss = ops.sum(x)
        loss.backward()  # here
        return loss

    assert "backward" in refused(of_an_argument, tg.tensor(X, requires_grad=True))
    assert all(p.grad is None for p in model.parameters())


def test_step() -> None:
    model = nn.Linear(2, 1)
    optimizer = optim.SGD(model, lr=0.5)
    for p in model.parameters():
        p.grad = np.ones(p.shape, np.float32)

    def f(x: Any) -> Any:
        y = model(x)
        optimizer.step()  # here
        return y

    refused(f, X)


def test_setting_a_gradient_or_data() -> None:
    model = nn.Linear(2, 1)

    def gradient(x: Any) -> Any:
        slope = tg.grad(lambda m: ops.sum(m(x)))(model)
        model.weight.grad = slope["weight"]  # here
        return slope

    def values(x: Any) -> Any:
        model.bias.data = model(x)  # here
        return x * 2.0

    def numbers(x: Any) -> Any:
        model.bias.data = np.zeros(1, np.float32)  # here
        return model(x) * 2.0

    refused(gradient, X)
    refused(values, X)
    assert "update parameters outside" in refused(numbers, X)


@pytest.mark.parametrize("way", ["optimizer", "module", "parameter", "clipping", "frozen"])
def test_gradients_that_would_be_cleared_clipped_or_refused_only_once(way: str) -> None:
    """Cleared at the recording only, they would add up from step to step."""
    model = nn.Linear(2, 1)
    optimizer = optim.SGD(model, lr=0.5)
    do = {
        "optimizer": optimizer.zero_grad,
        "module": model.zero_grad,
        "parameter": model.weight.zero_grad,
        "clipping": lambda: optim.clip_grad_norm(model, 1.0),
        "frozen": lambda: setattr(model.weight, "requires_grad", False),
    }[way]

    def f(x: Any) -> Any:
        do()  # here
        return ops.sum(model(x))

    with pytest.raises(tg.TraceError, match="outside of"):
        tg.compile(f)(X)
    if way in ("optimizer", "module", "parameter"):
        refused(f, X)


@pytest.mark.parametrize("name", ["register_hook", "retain_grad"])
def test_hooks_on_what_is_recorded(name: str) -> None:
    model = nn.Linear(2, 1)

    def f(x: Any) -> Any:
        y = model(x)
        getattr(y, name)(*([print] if name == "register_hook" else []))  # here
        return ops.sum(y)

    assert name in refused(f, X)


# ---------------------------------------------------------------------------- writing to what is outside


def appends(x: Any) -> Any:
    y = x * 2.0
    LIST.append(y)  # here
    return y + 1.0


def appends_number(x: Any) -> Any:
    LIST.append(3)  # here
    return x + 1.0


def sets_item(x: Any) -> Any:
    y = x * 2.0
    DICT["y"] = y  # here
    return y


def sets_global(x: Any) -> Any:
    global TOTAL
    TOTAL = TOTAL + ops.sum(x)  # here
    return x * 2.0


def in_a_helper(x: Any) -> Any:
    appends(x)
    return x


@pytest.mark.parametrize("f", [appends, appends_number, sets_item, sets_global])
def test_writing_outside(f: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LIST", []), ("DICT", {}), ("TOTAL", 0.0)):
        monkeypatch.setitem(globals(), name, value)
    assert "return" in refused(f, X)


def test_writing_outside_in_a_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LIST", [])
    refused(in_a_helper, X, where=appends)


@pytest.mark.parametrize("write", [lambda a: a.fill(7.0), lambda a: np.add(a, 1.0, out=a), lambda a: a.sort()])
def test_writing_to_an_array_outside(write: Any) -> None:
    statistics = np.array([3.0, 2.0])

    def f(x: Any) -> Any:
        write(statistics)
        return x * 2.0

    with pytest.raises(tg.TraceError, match="array that it closes over"):
        tg.compile(f)(X)

    def reads(x: Any) -> Any:
        own = np.zeros(2)
        own[0] = 1.0
        return x * own * statistics

    assert tg.compile(reads)(X).shape == (2,)


def test_a_data_set_in_many_arrays_is_not_read_through(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    checksum = reach.zlib.crc32
    monkeypatch.setattr(reach.zlib, "crc32", lambda data: looked_at.append(len(data)) or checksum(data))
    monkeypatch.setattr(reach, "MOST_CHECKED", 100)
    files = [np.zeros(n) for n in (20, 5, 5, 5)]
    assert tg.compile(lambda x: x * len(files))(X).tolist() == (X * 4).tolist()
    assert looked_at == [40, 40] * 2  # before and behind


def test_writing_to_the_data_of_a_parameter() -> None:
    model = nn.Linear(2, 1)

    def f(x: Any) -> Any:
        model.weight.data[0, 0] += 1.0  # here
        return model(x)

    refused(f, X)


def test_setting_an_attribute() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter([1.0, 2.0])
            self.last = None
            self.calls = 0

    def keeps(model: Any, x: Any) -> Any:
        y = model.w * x
        model.last = y  # here
        return y * 2.0

    def counts(model: Any, x: Any) -> Any:
        model.calls += 1  # here
        return model.w * x

    class Plain:
        last: Any = None

        def __call__(self, x: Any) -> Any:
            y = x * 2.0
            self.last = y  # here
            return y

    refused(keeps, Stateful(), X)
    refused(counts, Stateful(), X)
    refused(Plain(), X, where=Plain.__call__)


def test_a_tensor_that_escapes_to_where_nobody_looks() -> None:
    bin_of_tensors: Any = threading.local()

    def f(x: Any) -> Any:
        y = x * 2.0
        bin_of_tensors.y = y
        return y + 1.0

    with pytest.raises(tg.TraceError, match=r"shape \(2,\) that f computes was stored outside"):
        tg.compile(f)(X)


def test_reference_cycles_are_no_escape() -> None:
    def f(x: Any) -> Any:
        cycle: list[Any] = [x * 2.0]
        cycle.append(cycle)
        return cycle[0] + 1.0

    assert tg.compile(f)(X).tolist() == [2.0, 4.0]


def test_lists_of_its_own_are_fine() -> None:
    def f(x: Any) -> Any:
        rows, table = [], {}
        for k in range(3):
            rows.append(x * k)
            table[k] = rows[-1]
        return ops.stack([*rows, table[2]])

    assert tg.compile(f)(X).shape == (4, 2)


def test_errors_of_operations_are_the_plain_ones_with_the_line() -> None:
    def f(x: Any) -> Any:
        return x @ np.ones((3, 2), np.float32)

    with pytest.raises(tg.ShapeError, match="matmul"):
        tg.compile(f)(X)
    fast = tg.compile(lambda table, index: ops.take(table, index))
    with pytest.raises(tg.OutOfRangeError, match="index 7"):
        fast(X, np.array([7]))
    assert fast(X, np.array([1])).tolist() == [1.5]


def test_a_function_that_raises_leaves_nothing_behind() -> None:
    model = nn.Linear(2, 1)

    def f(model: Any, x: Any) -> Any:
        raise KeyError("mine")

    fast = tg.compile(tg.grad(f))
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            fast(model, X)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert fast.__wrapped__ is not None and repr(fast).endswith("0 signatures>")


def test_setting_a_tensor_as_an_attribute_is_refused_with_its_line() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory: Any = None

        def forward(self, x: Any) -> Any:
            return x + self.memory

    decoder = Decoder()

    @tg.compile
    def f(x: Any) -> Any:
        decoder.memory = ops.broadcast_to(x, (2, 3)) * 2.0
        return decoder(x).sum()

    line = f.__wrapped__.__code__.co_firstlineno + 2
    with pytest.raises(tg.TraceError, match=rf"outside of itself \(.*test_compile_errors.py:{line}\)"):
        f(np.ones(3))


def test_a_change_is_not_blamed_on_what_was_called_before_it() -> None:
    """Neither on a function of the user's that came back, nor on what Python called in the middle of the line."""
    box: dict[str, Any] = {}

    def doubled(x: Any) -> Any:
        return x * 2.0

    def called(phase: str, info: Any) -> None:
        pass

    @tg.compile
    def f(x: Any) -> Any:
        y = ops.tanh(x)
        box["memory"] = [doubled(y), gc.collect()]
        return y.sum()

    line = f.__wrapped__.__code__.co_firstlineno + 3
    gc.callbacks.append(called)
    try:
        with pytest.raises(tg.TraceError, match=rf"outside of itself \(.*test_compile_errors.py:{line}\)"):
            f(np.ones(3))
    finally:
        gc.callbacks.remove(called)
