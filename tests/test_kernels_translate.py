"""Native code from text: what it computes is what Python computes from the same text."""

from __future__ import annotations

import itertools
import threading
import types
from typing import Any

import numpy as np
import pytest

from tinygrad_lstm.kernels import codecache

# Every construct, in functions of up to three numbers.
TEXT = '''
from __future__ import annotations

from tinygrad_lstm.kernels.dialect import entry, exported, private

STEP = 3
LIMIT = 2**40
SIGN = -1


@private
def smallest_factor(n: int) -> int:
    """A while loop that is left from inside."""
    k = 2
    while True:
        if k * k > n:
            return n
        if n % k == 0:
            return k
        k += 1


@private
def even(n: int) -> bool:
    return n % 2 == 0


@private
def nothing(n: int) -> None:
    if n > 3:
        return
    n = 2


@entry
def factors(a: int, b: int, c: int) -> int:
    n = min(abs(a) + 2, LIMIT)
    total = 0
    while n > 1:
        k = smallest_factor(n)
        nothing(k)
        total = 31 * total + k
        n //= k
    return total


@entry
def division(a: int, b: int, c: int) -> int:
    b = b if b != 0 else STEP
    return 7 * (a // b) + a % b


@entry
def shifts(a: int, b: int, c: int) -> int:
    return (a << (b & 7)) ^ (a >> 3) | (b & ~c) & -a


@entry
def choices(a: int, b: int, c: int) -> int:
    if a < b < c or not a == c and b >= SIGN:
        x, y = a, b
    elif a and (b or c):
        x, y = b, c
    else:
        x, y = c, a
    x, y = y, x
    return 100 * min(x, y) + 10 * max(a, b) + (x if even(y) else -y) + (a != c)


@entry
def loops(a: int, b: int, c: int) -> int:
    total = 0
    for i in range(a % 7):
        for j in range(i, b % 11, 2):
            if j == c % 5:
                continue
            if j > 8:
                break
                total += 1000
            total += i * 10 + j
            j = 100
        i = total
    for k in range(b % 9, -3, -2):
        total = 3 * total + k
    step = abs(c) % 4 + 1
    for k in range(0, a % 30, step):
        total -= k
    return total


@entry
def flags(a: int, b: int, c: int) -> bool:
    merge = a < b
    if c > 0:
        merge = False
    count = 0
    count += merge
    count += b < c
    return count == 1 or merge


@entry
def halves(a: int, b: int, c: int) -> int:
    x = a * 0.5
    y = 1.5 if b > c else x - b
    return (x < y) + 2 * (x != x) + 4 * (-y <= 0.25) + 8 * (x * y + 1.0 > c)


@exported
def alone() -> int:
    return 5
'''
FUNCTIONS = ("factors", "division", "shifts", "choices", "loops", "flags", "halves")
NUMBERS = (-17, -8, -2, -1, 0, 1, 2, 3, 5, 12, 97)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> codecache.Program:
    return codecache.load(TEXT, stem="test")


@pytest.fixture(scope="module")
def python() -> dict[str, Any]:
    """The same text as Python; the decorators do nothing."""
    module = types.ModuleType("text")
    exec(compile(TEXT, "text", "exec"), module.__dict__)
    return module.__dict__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_native_code_computes_what_python_does(program: codecache.Program, python: Any, name: str) -> None:
    native = program.function(name)
    for given in itertools.product(NUMBERS, repeat=3):
        found, expected = native(*given), python[name](*given)
        assert found == expected and type(found) is type(expected), given


@pytest.mark.slow
def test_native_code_computes_what_numba_does(program: codecache.Program) -> None:
    head = "from tinygrad_lstm.kernels.dialect import entry, exported, private"
    assert head in TEXT
    module = types.ModuleType("text")
    exec(TEXT.replace(head, "from numba import njit\nentry = exported = private = njit"), module.__dict__)
    for name in FUNCTIONS:
        native, njit = program.function(name), module.__dict__[name]
        for given in itertools.product(NUMBERS, repeat=3):
            assert native(*given) == njit(*given), (name, given)


def test_integers_wrap_around(program: codecache.Program) -> None:
    top = 2**63 - 1
    assert program.function("division")(top, 1, 0) == (7 * top + 2**63) % 2**64 - 2**63
    assert program.function("division")(-(2**63), 2, 0) == (7 * -(2**62) + 2**63) % 2**64 - 2**63


def test_a_function_of_python_checks_what_it_gets(program: codecache.Program) -> None:
    division = program.function("division")
    assert program.function("division") is division
    assert division(np.int64(-7), True, -1) == -49 and division(-1, -1, -1) == 7
    with pytest.raises(TypeError, match="division takes 3 arguments"):
        division(1, 2)
    with pytest.raises(TypeError):
        division(1.5, 2, 3)
    with pytest.raises(TypeError):
        division("1", 2, 3)
    with pytest.raises(OverflowError):
        division(1, 2**63, 3)
    with pytest.raises(TypeError):
        division(1, 2, keyword=3)


def test_only_what_is_exported_has_an_address(program: codecache.Program) -> None:
    assert program.address("alone") and program.address("loops")
    with pytest.raises(KeyError):
        program.address("even")
    with pytest.raises(KeyError):
        program.function("alone")


def test_other_threads_run_meanwhile() -> None:
    """An entry waits for a lock that only another thread of Python can release."""
    text = """
from tinygrad_lstm.kernels.atomics import load_acquire, store_release, yield_cpu
from tinygrad_lstm.kernels.dialect import entry

@entry
def meet(mine, other):
    store_release(mine, 1)
    while load_acquire(other) == 0:
        yield_cpu()
    return 1
"""
    meet = codecache.load(text, stem="test").function("meet")
    words = np.zeros(2, np.int64)
    here, there = words.ctypes.data, words.ctypes.data + 8
    thread = threading.Thread(target=meet, args=(there, here))
    thread.start()
    assert meet(here, there) == 1
    thread.join()


def body(*lines: str) -> str:
    head = "from tinygrad_lstm.kernels.dialect import entry\nword = 'text'\n@entry\ndef f(a):\n"
    return head + "".join(f"    {line}\n" for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (body("return a / 2"), "f, line 5: Div"),
        (body("return a ** 2"), "f, line 5: Pow"),
        (body("return [a]"), "f, line 5: List"),
        (body("return a.real"), "f, line 5: Attribute"),
        (body("return a is a"), "f, line 5: Is"),
        (body("return word"), "'text'"),
        (body("return b"), "b, which has no value yet"),
        (body("return print(a)"), "print"),
        (body("return min(a, a, a)"), "min"),
        (body("for k in (1, 2):", "    a += k"), "a loop over anything but range"),
        (body("while a:", "    a -= 1", "else:", "    a = 1"), "else behind a loop"),
        (body("a", "return 1"), "an expression without effect"),
        (body("a.b = 1"), "an assignment to anything but a name"),
        (body("with a:", "    pass"), "With"),
        (body("return f(a, a)"), "f with 2 arguments"),
        (body("x = 1", "x = 0.5", "return x"), "f: double where i64 is needed"),
        (body("return 0.5"), "f: double where i64 is needed"),
    ],
)
def test_what_is_not_a_part_of_native_code_is_refused(text: str, message: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        codecache.load(text, stem="test")
    assert message in str(caught.value)
