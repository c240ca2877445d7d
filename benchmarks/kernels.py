"""Times of the kernels layer: elementwise leaves, an LSTM cell's gates, dispatch overhead, matmul rules.

Run ``python benchmarks/kernels.py``.  Medians of interleaved repeats; NumPy and native in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from tinygrad_lstm.kernels import build, evaluate, fused, matmul
from tinygrad_lstm.kernels import expression as e


def compare(*functions: Callable[[], Any], repeats: int = 15) -> list[float]:
    """Median seconds a call of each function, the functions interleaved."""
    counts = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        counts.append(max(1, int(2e-3 / max(time.perf_counter() - start, 1e-7))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, count, found in zip(functions, counts, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                function()
            found.append((time.perf_counter() - start) / count)
    return [median(found) for found in times]


def leaves() -> None:
    x = np.abs(np.random.default_rng(0).standard_normal(1 << 14)).astype(np.float32)
    out = np.empty_like(x)
    print("float32 leaves, 16384 elements, ns an element: native, NumPy")
    for name in ("exp", "exp2", "expm1", "log", "log2", "log1p", "tanh", "erf", "sigmoid", "softplus"):
        expression = build(getattr(e, name), 1)
        kernel = fused(expression, ["float32"])
        native, plain = compare(lambda k=kernel: k([x], [out]), lambda f=expression: f.numpy(x))
        print(f"  {name:9s} {native / x.size * 1e9:7.3f} {plain / x.size * 1e9:7.3f}")


def gates(zi: e.Expr, zf: e.Expr, zg: e.Expr, zo: e.Expr, c: e.Expr, bias: e.Expr) -> tuple[e.Expr, ...]:
    i, f, g, o = e.sigmoid(zi + bias), e.sigmoid(zf), e.tanh(zg), e.sigmoid(zo)
    new = f * c + i * g
    t = e.tanh(new)
    return i, f, g, o, new, o * t


def cell() -> None:
    expression = build(gates, 6)
    kernel = fused(expression, ["float32"] * 6)
    rng = np.random.default_rng(0)
    print("LSTM gates from column slices, 12 operands, us a call: native, NumPy")
    for batch, width in ((1, 16), (8, 16), (32, 64), (32, 128), (64, 256)):
        z = rng.standard_normal((batch, 4 * width)).astype(np.float32)
        inputs = [*np.split(z, 4, axis=1), np.zeros((batch, width), np.float32), np.zeros(width, np.float32)]
        outputs = [np.empty((batch, width), np.float32) for _ in range(6)]
        native, plain = compare(lambda i=inputs, o=outputs: kernel(i, o), lambda i=inputs: expression.numpy(*i))
        print(f"  {batch:3d} x {width:3d}  {native * 1e6:8.2f} {plain * 1e6:8.2f}")


def threshold() -> None:
    expressions = {
        "a + b * 2": build(lambda a, b: a + b * 2, 2),
        "tanh(a) * 2 + b": build(lambda a, b: e.tanh(a) * 2 + b, 2),
        "sigmoid(a) * b": build(lambda a, b: e.sigmoid(a) * b, 2),
    }
    print("two inputs with output allocated, us a call: native, NumPy")
    for name, expression in expressions.items():
        kernel = fused(expression, ["float32"] * 2)
        for size in (64, 1024, 4096, 16384, 65536):
            a = np.random.default_rng(0).standard_normal(size).astype(np.float32)
            native, plain = compare(
                lambda k=kernel, a=a: k((a, a), (np.empty(a.shape, np.float32),)),
                lambda f=expression, a=a: f.numpy(a, a),
            )
            print(f"  {name:16s} {size:6d} {native * 1e6:8.2f} {plain * 1e6:8.2f}")
    expression = expressions["sigmoid(a) * b"]
    a = np.zeros(8, np.float32)
    through, direct = compare(lambda: evaluate(expression, (a, a)), lambda: expression.numpy(a, a))
    print(f"  evaluate's own overhead on small arrays: {(through - direct) * 1e9:.0f} ns")


def products() -> None:
    rng = np.random.default_rng(0)
    print("matmul, us a call: here, np.matmul")
    for left, right in (
        ((4, 16), (16, 4)),
        ((32, 64), (64, 256)),
        ((50, 8, 16), (16, 64)),
        ((50, 32, 32), (32, 256)),
        ((1000, 8, 64), (64, 256)),
        ((200, 32, 32), (200, 32, 32)),
    ):
        a, b = rng.standard_normal(left).astype(np.float32), rng.standard_normal(right).astype(np.float32)
        here, plain = compare(lambda a=a, b=b: matmul(a, b), lambda a=a, b=b: np.matmul(a, b))
        print(f"  {left!s:14s} @ {right!s:14s} {here * 1e6:9.2f} {plain * 1e6:9.2f}")


if __name__ == "__main__":
    leaves()
    cell()
    threshold()
    products()
