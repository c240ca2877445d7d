"""Check gradients against central differences, in float64: the library's cells and layers, or a module of yours.

Checked are the gradients of all parameters, of x and of the state, of a random projection of all outputs.  A cell is
checked for one step, anything else for a sequence (T, B, input).  Dropout and the like are off.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from tinygrad_lstm.cli.options import integer
from tinygrad_lstm.cli.subjects import CELLS, LAYERS, Subject, add_subject, sequence, subject_of
from tinygrad_lstm.errors import Error, GradcheckError

NAME = "gradcheck"
HELP = "check gradients against finite differences"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_subject(parser, several=True)
    parser.add_argument("--order", type=int, choices=(1, 2), default=1, help="2: second derivatives too (default: 1)")
    sizes = (("input", 2, "width of x"), ("hidden", 3, "units"), ("batch", 2, "rows"), ("steps", 3, "steps"))
    for name, default, about in sizes:
        parser.add_argument(
            f"--{name}", type=integer(1), default=default, metavar="N", help=f"{about} (default: {default})"
        )


def run(args: argparse.Namespace) -> int:
    """Check one after the other, a line each; the status says whether all are right."""
    failed: list[str] = []
    subjects = [subject_of(args, what, np.float64) for what in args.what or [*CELLS, *LAYERS]]
    for subject in subjects:
        try:
            with subject.explained():
                about = check(subject, args)
            print(f"{subject.name:<14} ok     {about}", flush=True)
        except GradcheckError as error:
            print(f"{subject.name:<14} WRONG  {error}", flush=True)
            failed.append(subject.name)
    if failed:
        raise Error(f"{len(failed)} of {len(subjects)} gradients are wrong: {', '.join(failed)}")
    return 0


def check(subject: Subject, args: argparse.Namespace) -> str:
    """Check one module; what was checked, in words."""
    from tinygrad_lstm import gradcheck
    from tinygrad_lstm.inspect.recorded import is_cell
    from tinygrad_lstm.nn.recurrent import check_pair
    from tinygrad_lstm.tree import flatten, unflatten

    module = subject.module.astype(np.float64).eval()
    if subject.checkpoint is not None:
        ids = np.random.default_rng(args.seed).integers(0, module.vocabulary_size, (args.steps, args.batch))
        gradcheck(lambda m: m(ids), module, order=args.order)
        return f"{module.count()} parameters, order {args.order}"
    x = sequence(subject, args.steps, args.batch, args.input, args.seed)
    if is_cell(module):
        leaves, treedef = flatten(module.initial_state(args.batch))
        rng = np.random.default_rng(args.seed + 1)
        state = [rng.standard_normal(leaf.shape) for leaf in leaves]

        def step(cell: Any, x: Any, *parts: Any) -> Any:
            result = cell(x, unflatten(treedef, parts))
            check_pair(type(cell).__name__, result)
            return result

        _check(gradcheck, step, args.order, module, x[0], *state)
        return f"{module.count()} parameters, x, the state ({len(state)}), order {args.order}"
    _check(gradcheck, lambda m, x: m(x), args.order, module, x)
    return f"{module.count()} parameters, x, {args.steps} steps, order {args.order}"


def _check(gradcheck: Any, function: Any, order: int, *arguments: Any) -> None:
    """Second derivatives are themselves divided differences of gradients, so they are known to fewer digits."""
    if order == 1:
        gradcheck(function, *arguments)
    else:
        gradcheck(function, *arguments, order=2, rtol=1e-4, atol=1e-6)
