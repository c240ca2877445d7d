"""Times of ``optimizer.step()`` and ``clip_grad_norm`` against torch's, and of softmax cross-entropy.

Run ``python benchmarks/optimizers.py``.  One thread, contenders interleaved, medians and minima in microseconds.
torch has three ways to step on a CPU: ``foreach=False`` (its default there), ``foreach=True`` and ``fused=True``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from tinygrad_lstm import nn, optim, tensor

# A character language model: embedding, two LSTM layers of 128 units, and a linear layer.
CHARACTER_MODEL = [(96, 128), *[(512, 128), (512, 128), (512,), (512,)] * 2, (96, 128), (96,)]
SMALL = [(16, 16)] * 100


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Microseconds of every call of every function, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + repeats // 4):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= repeats // 4:  # the first ones compile and warm up
                times[name].append((time.perf_counter() - start) * 1e6)
    return times


def show(title: str, times: dict[str, list[float]]) -> None:
    print(title)
    first = next(iter(times.values()))
    for name, found in times.items():
        ratio = median(first) / median(found)
        print(f"  {name:34s} median {median(found):9.1f}  min {min(found):9.1f}  ours / this {ratio:5.2f}")


def parameters(shapes: list[tuple[int, ...]], transposed: bool) -> list[nn.Parameter]:
    """Parameters with gradients; products ``x.T @ g`` leave those of matrices transposed in memory."""
    rng = np.random.default_rng(0)
    params = [nn.Parameter(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
    for p in params:
        gradient = rng.normal(size=p.shape).astype(np.float32) * np.float32(1e-3)
        p.grad = np.asfortranarray(gradient) if transposed else gradient
    return params


def steps(torch: Any, repeats: int) -> None:
    for title, shapes in (("character model", CHARACTER_MODEL), ("100 arrays of 16 x 16", SMALL)):
        for name, options in (("Adam", {}), ("SGD", {"lr": 1e-3, "momentum": 0.9})):
            calls: dict[str, Callable[[], Any]] = {}
            for transposed in (False, True):
                label = "ours, transposed gradients" if transposed else "ours"
                calls[label] = getattr(optim, name)(parameters(shapes, transposed), **options).step
            for way in ({"foreach": False}, {"foreach": True}, {"fused": True}) if torch is not None else ():
                theirs = [torch.nn.Parameter(torch.from_numpy(p.numpy().copy())) for p in parameters(shapes, False)]
                for p in theirs:
                    p.grad = torch.full_like(p, 1e-3)
                calls[f"torch {way}"] = getattr(torch.optim, name)(theirs, **options, **way).step
            show(f"{title}: {name}.step()", interleaved(calls, repeats))


def clipping(torch: Any, repeats: int) -> None:
    for title, shapes in (("character model", CHARACTER_MODEL), ("100 arrays of 16 x 16", SMALL)):
        for what, most in (("norm only", 1e9), ("norm and scaling", 1e-3)):
            ours, other = parameters(shapes, False), parameters(shapes, True)
            calls: dict[str, Callable[[], Any]] = {
                "ours": lambda p=ours, m=most: optim.clip_grad_norm(p, m),
                "ours, transposed gradients": lambda p=other, m=most: optim.clip_grad_norm(p, m),
            }
            for foreach in (False, True) if torch is not None else ():
                theirs = [torch.nn.Parameter(torch.from_numpy(p.numpy().copy())) for p in ours]
                for p in theirs:
                    p.grad = torch.full_like(p, 1e-3)
                calls[f"torch foreach={foreach}"] = lambda p=theirs, m=most, f=foreach: torch.nn.utils.clip_grad_norm_(
                    p, m, foreach=f
                )
            show(f"{title}: clip_grad_norm, {what}", interleaved(calls, repeats))


def cross_entropy(torch: Any, repeats: int) -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(3200, 96)).astype(np.float32), rng.integers(0, 96, 3200)
    x = tensor(logits, requires_grad=True)

    def ours() -> None:
        x.grad = None
        nn.cross_entropy(x, target).backward()

    calls: dict[str, Callable[[], Any]] = {"ours": ours, "ours, forward": lambda: nn.cross_entropy(x, target)}
    if torch is not None:
        y, t = torch.from_numpy(logits.copy()).requires_grad_(), torch.from_numpy(target)

        def theirs() -> None:
            y.grad = None
            torch.nn.functional.cross_entropy(y, t).backward()

        calls["torch"] = theirs
        calls["torch, forward"] = lambda: torch.nn.functional.cross_entropy(y, t)
    show("cross_entropy of (3200, 96) logits, forward and backward", interleaved(calls, repeats))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a short form that only shows that it runs")
    arguments = parser.parse_args()
    repeats = 3 if arguments.smoke else 300
    try:
        import torch
    except ImportError:
        torch = None
        print("torch is not installed: our own times only")
    else:
        torch.set_num_threads(1)
    steps(torch, repeats)
    clipping(torch, repeats)
    cross_entropy(torch, repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
