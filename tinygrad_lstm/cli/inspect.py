"""The equations of a cell or of a model's cells; drawings, gradients over time, and a page that plays them.

WHAT is a cell of the library, the folder (or a checkpoint) of a run of `tinygrad-lstm train`, or FILE.py:NAME.
--flow and --player need a sequence and a loss.  A run's model reads --prompt (without it, the beginning of its
held-out text), and its loss is that of predicting each next character.  Anything else reads random numbers, and its
loss is the mean of the squares of its last output.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_lstm.cli.options import UsageError, integer
from tinygrad_lstm.cli.subjects import Subject, add_subject, sequence, subject_of
from tinygrad_lstm.errors import ArgumentError, OutOfRangeError

NAME = "inspect"
HELP = "equations, drawings, gradients over time, and a player of a cell or a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_subject(parser)
    parser.add_argument("--input", type=integer(1), default=2, metavar="N", help="width of x (default: %(default)s)")
    parser.add_argument("--hidden", type=integer(1), default=3, metavar="N", help="units (default: %(default)s)")
    group = parser.add_argument_group("equations")
    group.add_argument("--latex", action="store_true", help="print LaTeX")
    group.add_argument(
        "--rename", action="append", default=[], type=_pair, metavar="OLD=NEW", help="another letter, such as g=a"
    )
    group.add_argument("--draw", metavar="FILE", help="write a drawing as well: .svg, .dot, .png or .pdf")
    group = parser.add_argument_group("a run over a sequence, in place of the equations")
    group.add_argument(
        "--player",
        metavar="FILE",
        help="write an .html page that plays backpropagation through time",
    )
    group.add_argument("--flow", action="store_true", help="print the norms of the gradients at every step")
    group.add_argument("--steps", type=integer(1), metavar="T", help="steps of the sequence (default: 20)")
    group.add_argument("--prompt", metavar="TEXT", help="what a run's model reads")


def _pair(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not (separator and old and new):
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW")
    return old, new


def run(args: argparse.Namespace) -> int:
    """Print the equations; write what was asked for."""
    from tinygrad_lstm.inspect import drawing, page
    from tinygrad_lstm.inspect.recorded import cells_of

    _check_ending("--draw", args.draw, drawing.ENDINGS)
    _check_ending("--player", args.player, page.ENDINGS)
    subject = subject_of(args, args.what, np.float32)
    if args.prompt is not None and subject.checkpoint is None:
        raise UsageError("--prompt is for the model of a run; other modules read random numbers")
    runs = args.player or args.flow
    if runs and (args.latex or args.rename):
        raise UsageError("--latex and --rename are for the equations; give them without --player and --flow")
    with subject.explained():
        if runs or args.draw:
            _run_over(subject, args)
        if not runs and (not args.draw or cells_of(subject.module)):
            _equations(subject, args)
    return 0


def _check_ending(option: str, path: str | None, endings: tuple[str, ...]) -> None:
    if path is not None and Path(path).suffix.lower() not in endings:
        raise UsageError(f"{option} {path!r} does not end in {', '.join(endings)}")


def _equations(subject: Subject, args: argparse.Namespace) -> None:
    from tinygrad_lstm import inspect

    try:
        print(inspect.equations(subject.module, args.latex, rename=dict(args.rename)))
    except ArgumentError as error:
        if "rename" not in str(error):
            raise
        raise UsageError(str(error)) from None


def _run_over(subject: Subject, args: argparse.Namespace) -> None:
    from tinygrad_lstm import inspect
    from tinygrad_lstm.inspect.recorded import is_cell

    module, x, loss, target = _sequence(subject, args)
    if args.draw:
        if is_cell(subject.module):
            inspect.draw(subject.module, args.draw)
        else:
            inspect.draw(subject.module, args.draw, x=x)
        print(f"wrote {args.draw}")
    if args.player:
        inspect.player(module, x, loss, args.player, target, title=f"{subject.name}: {x.shape[0]} steps")
        print(f"wrote {args.player}")
    if args.flow:
        print(inspect.gradient_flow(module, x, loss, target))


def _sequence(subject: Subject, args: argparse.Namespace) -> tuple[Any, np.ndarray, Any, Any]:
    """(a module that reads sequences, what it reads, a loss, its target)."""
    from tinygrad_lstm import nn
    from tinygrad_lstm.inspect.recorded import is_cell
    from tinygrad_lstm.tree import flatten

    if subject.checkpoint is not None:
        ids = _characters(subject.checkpoint, args.prompt, args.steps)
        return subject.module, ids[:-1, None], lambda out, y: nn.cross_entropy(out[0], y), ids[1:, None]
    module = nn.Recurrent(subject.module) if is_cell(subject.module) else subject.module
    x = sequence(subject, args.steps or 20, 1, args.input, args.seed)
    return module, x, lambda out: (flatten(out)[0][0][-1] ** 2.0).mean(), None


def _characters(tree: dict[str, Any], prompt: str | None, steps: int | None) -> np.ndarray:
    """The ids that a run's model reads, and the one behind them."""
    from tinygrad_lstm.cli.evaluate import training_corpus
    from tinygrad_lstm.data.text import encode

    if prompt is None:
        return training_corpus(tree["corpus"]).held_out[: (steps or 20) + 1]
    if len(prompt) < 2:
        raise UsageError("--prompt has at least 2 characters: each is to predict the next one")
    try:
        return encode(prompt, tree["vocabulary"])[: None if steps is None else steps + 1]
    except OutOfRangeError as error:
        raise UsageError(f"--prompt: {error}") from None
