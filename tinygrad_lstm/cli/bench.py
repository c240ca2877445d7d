"""Time gradient steps on this machine: forward, mean of the squares of the output, backward to all parameters and x.

The first calls, which compile, are not counted.  Reported are the median and the quartiles of the rounds; GFLOP/s
count the multiplications and additions of the matrix products alone (forward, and twice as many backward), tokens are
steps times rows.  Other processes change such numbers: look at the quartiles, and run it again.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_lstm.cli.options import integer
from tinygrad_lstm.cli.subjects import Subject, add_subject, sequence, subject_of

NAME = "bench"
HELP = "time gradient steps of a cell or a model on this machine"
WARM = 3  # calls that are not counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_subject(parser, default="lstm")
    sizes = (("steps", 50), ("batch", 32), ("input", 32), ("hidden", 64), ("rounds", 30))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=integer(1), default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="default: float32")
    parser.add_argument("--threads", type=integer(1), metavar="N", help="default: all that the process may use")


def run(args: argparse.Namespace) -> int:
    """Time it and print one report."""
    from tinygrad_lstm import get_num_threads, set_num_threads

    before = get_num_threads()
    try:
        if args.threads is not None:
            set_num_threads(args.threads)
        subject = subject_of(args, args.what, args.dtype)
        with subject.explained():
            step, flop, shape = prepare(subject, args)
            seconds = timed(step, args.rounds)
        print(report(subject, args, get_num_threads(), shape, seconds, flop))
    finally:
        set_num_threads(before)
    return 0


def prepare(subject: Subject, args: argparse.Namespace) -> tuple[Callable[[], Any], float, tuple[int, int]]:
    """(one gradient step, operations of its matrix products, (T, B))."""
    from tinygrad_lstm import nn, tensor
    from tinygrad_lstm.inspect.recorded import is_cell, record_module
    from tinygrad_lstm.tree import flatten

    module = subject.module
    x: Any
    if subject.checkpoint is not None:
        x = np.random.default_rng(args.seed).integers(0, module.vocabulary_size, (args.steps, args.batch))
        module = module.astype(args.dtype)
    else:
        module = module.astype(args.dtype)
        if is_cell(module):
            module = nn.Recurrent(module)
        x = sequence(subject, args.steps, args.batch, args.input, args.seed)
    flop = 3.0 * products(record_module(module, x).program)
    given = tensor(x, requires_grad=x.dtype.kind == "f")

    def step() -> None:
        module.zero_grad()
        given.zero_grad()
        (flatten(module(given))[0][0] ** 2.0).mean().backward()

    return step, flop, (args.steps, args.batch)


def products(program: Any) -> float:
    """Multiplications and additions of the matrix products of a program, loops included."""
    total = 0.0
    for equation in program.equations:
        if equation.primitive.name == "matmul":
            inner = program.aval(equation.operands[0]).shape[-1]
            total += 2.0 * inner * math.prod(program.avals[equation.outputs[0]].shape)
        for value in equation.params.values():
            if hasattr(value, "equations"):  # the body of a loop
                total += products(value) * equation.params.get("length", 1)
    return total


def timed(step: Callable[[], Any], rounds: int) -> np.ndarray:
    """Seconds of each round."""
    for _ in range(WARM):
        step()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return np.asarray(seconds)


def report(
    subject: Subject, args: argparse.Namespace, threads: int, shape: tuple[int, int], seconds: np.ndarray, flop: float
) -> str:
    """The report as text."""
    low, median, high = np.percentile(seconds, [25, 50, 75])
    sizes = f"T={shape[0]} B={shape[1]}"
    if subject.checkpoint is None:
        sizes += f" input={args.input} hidden={args.hidden}"
    lines = [
        f"{subject.name}, {sizes}, {args.dtype}, {threads} thread{'s' if threads > 1 else ''}, "
        f"{platform.machine()}, numpy {np.__version__}",
        f"gradient step  {1e3 * median:.3g} ms (quartiles {1e3 * low:.3g} to {1e3 * high:.3g}, "
        f"fastest {1e3 * seconds.min():.3g}, {len(seconds)} rounds)",
    ]
    if flop:
        lines.append(f"products       {flop / median / 1e9:.3g} GFLOP/s ({flop / 1e6:.3g} MFLOP a step)")
    lines.append(f"throughput     {shape[0] * shape[1] / median:,.0f} tokens/s")
    return "\n".join(lines)
