"""Overhead of the eager tape per op, against torch's eager ops with autograd; bare NumPy for comparison.

    python benchmarks/eager_overhead.py [--smoke] [--json FILE]

Operands are float32 (32, 128) unless told otherwise, they require gradients, one thread.  What is timed, the
contenders taking turns in every round of one process (medians over the rounds):

- forward: one op that is recorded, its result dropped at once;
- forward + backward: the op, and the replay of its record into ``.grad`` of its operands (a given cotangent; the
  gradients are set to None before each call, in both libraries);
- chain: 50 ops one after the other (multiply, add, tanh, ...), forward and forward + backward, divided by 50.

The NumPy column is the arithmetic alone, forward and backward: what a tape adds to it is its overhead.  The target
is a time of at most .60 of torch's, forward + backward.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

import tinygrad_lstm as tg
from tinygrad_lstm import ops

TARGET = 0.60
LENGTH = 50
Call = Callable[[], Any]
Case = dict[str, Call]  # contender -> what is timed; "numpy" may be absent


def forward_cases(arrays: list[np.ndarray]) -> dict[str, Case]:
    """One recorded op, and a chain of them."""
    x, y = [tg.tensor(a, requires_grad=True) for a in arrays[:2]]
    u, v = [torch.tensor(a, requires_grad=True) for a in arrays[:2]]
    a, b = arrays[:2]
    return {
        "add": {"ours": lambda: ops.add(x, y), "torch": lambda: torch.add(u, v), "numpy": lambda: np.add(a, b)},
        "multiply": {"ours": lambda: x * y, "torch": lambda: u * v, "numpy": lambda: a * b},
        "tanh": {"ours": lambda: ops.tanh(x), "torch": lambda: torch.tanh(u), "numpy": lambda: np.tanh(a)},
        "chain": {
            "ours": lambda: chain(x, y, ops.tanh),
            "torch": lambda: chain(u, v, torch.tanh),
            "numpy": lambda: chain(a, b, np.tanh),
        },
    }


def backward_cases(arrays: list[np.ndarray]) -> dict[str, Case]:
    """The same ops with the gradients of their operands."""
    x, y, g = [tg.tensor(a, requires_grad=k < 2) for k, a in enumerate(arrays)]
    u, v, h = [torch.tensor(a, requires_grad=k < 2) for k, a in enumerate(arrays)]
    a, b, c = arrays

    def ours(run: Callable[[], Any], *leaves: Any) -> Call:
        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            run().backward(g)

        return call

    def theirs(run: Callable[[], Any], *leaves: Any) -> Call:
        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            run().backward(h)

        return call

    def numpy_tanh() -> np.ndarray:
        out = np.tanh(a)
        return c * (1 - out * out)

    return {
        "add": {
            "ours": ours(lambda: x + y, x, y), "torch": theirs(lambda: u + v, u, v),
            "numpy": lambda: (a + b, c.copy(), c.copy()),
        },
        "multiply": {
            "ours": ours(lambda: x * y, x, y), "torch": theirs(lambda: u * v, u, v),
            "numpy": lambda: (a * b, c * b, c * a),
        },
        "tanh": {"ours": ours(lambda: ops.tanh(x), x), "torch": theirs(lambda: torch.tanh(u), u), "numpy": numpy_tanh},
        "chain": {
            "ours": ours(lambda: chain(x, y, ops.tanh), x, y),
            "torch": theirs(lambda: chain(u, v, torch.tanh), u, v),
            "numpy": lambda: numpy_chain(a, b, c),
        },
    }  # fmt: skip


def chain(x: Any, y: Any, tanh: Callable[[Any], Any]) -> Any:
    """LENGTH ops, each using the one before: multiply, add, add, multiply, tanh, and again."""
    for _ in range(LENGTH // 5):
        x = tanh(((x * y) + y + x) * y)
    return x


def numpy_chain(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:func:`chain` with its gradients, by hand."""
    kept = []
    for _ in range(LENGTH // 5):
        total = a * b + b + a
        out = np.tanh(total * b)
        kept.append((a, total, out))
        a = out
    slope_b = np.zeros_like(b)
    for a, total, out in reversed(kept):
        c = c * (1 - out * out)
        slope_b += c * total
        c = c * b
        slope_b += c
        slope_b += c * a
        c = c + c * b
    return c, slope_b


def measure(case: Case, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds a call of every contender; they take turns in every round, in an order that rotates."""
    names = list(case)
    counts = {}
    for name in names:
        case[name]()
        begin = time.perf_counter()
        for _ in range(5):
            case[name]()
        counts[name] = max(3, int(5 * seconds / (time.perf_counter() - begin)))
    found: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            call = case[name]
            begin = time.perf_counter()
            for _ in range(counts[name]):
                call()
            found[name].append((time.perf_counter() - begin) / counts[name])
    return {name: median(times) for name, times in found.items()}


def same_gradients(arrays: list[np.ndarray]) -> None:
    """Stop unless both libraries compute the same thing."""
    x, y, g = [tg.tensor(a, requires_grad=k < 2) for k, a in enumerate(arrays)]
    u, v, h = [torch.tensor(a, requires_grad=k < 2) for k, a in enumerate(arrays)]
    chain(x, y, ops.tanh).backward(g)
    chain(u, v, torch.tanh).backward(h)
    by_hand = numpy_chain(*arrays)
    for mine, other, third in ((x.grad, u.grad, by_hand[0]), (y.grad, v.grad, by_hand[1])):
        np.testing.assert_allclose(mine, other.numpy(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(mine, third, rtol=1e-3, atol=1e-4)


def main() -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="very short: shows that it runs, measures nothing well")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--shape", type=int, nargs="+", default=[32, 128], help="of the operands (default 32 128)")
    options = parser.parse_args()
    rounds, seconds = (3, 2e-4) if options.smoke else (31, 1e-2)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    arrays = [(0.5 * rng.standard_normal(options.shape)).astype(np.float32) for _ in range(3)]
    same_gradients(arrays)

    rows: list[dict[str, Any]] = []
    print(f"float32 {options.shape}, one thread, microseconds an op, medians of {rounds} interleaved rounds")
    print(f"{'':26s}{'ours':>8s}{'torch':>8s}{'NumPy':>8s}{'ours/torch':>12s}")
    for what, cases in (("forward", forward_cases(arrays)), ("forward + backward", backward_cases(arrays))):
        for name, case in cases.items():
            times = measure(case, rounds, seconds)
            per_op = {key: 1e6 * value / (LENGTH if name == "chain" else 1) for key, value in times.items()}
            ratio = per_op["ours"] / per_op["torch"]
            rows.append({"what": what, "op": name, **per_op, "ratio": ratio})
            print(
                f"{what:19s}{name:8s}{per_op['ours']:7.2f}{per_op['torch']:8.2f}{per_op['numpy']:8.2f}{ratio:12.2f}",
                flush=True,
            )
    both = [row["ratio"] for row in rows if row["what"] == "forward + backward"]
    mean = float(np.exp(np.mean(np.log(both))))
    print(f"forward + backward, geometric mean: {mean:.2f} of torch's time (target: at most {TARGET:.2f})")
    if options.json:
        environment = {
            "python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__,
            "machine": platform.machine(), "shape": options.shape, "rounds": rounds,
        }  # fmt: skip
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"environment": environment, "microseconds": rows, "mean_ratio": mean, "target": TARGET}, file)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
