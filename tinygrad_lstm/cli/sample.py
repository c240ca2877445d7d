"""Let a trained language model write: text that goes on after the prompt."""

from __future__ import annotations

import argparse

from tinygrad_lstm.cli.options import UsageError, integer, model_file, number
from tinygrad_lstm.errors import OutOfRangeError
from tinygrad_lstm.random import Generator

NAME = "sample"
HELP = "sample text from a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run")
    parser.add_argument("--prompt", default="\n", help="what the text starts with (default: a new line)")
    parser.add_argument(
        "--temperature",
        type=number(0),
        default=0.8,
        metavar="T",
        help="below 1 more cautious, above 1 more surprising, 0 always the likeliest (default: %(default)s)",
    )
    parser.add_argument(
        "--length", type=integer(0), default=500, metavar="N", help="characters to draw (default: %(default)s)"
    )
    parser.add_argument("--seed", type=integer(0), metavar="N", help="repeats a sample (default: a new one each time)")


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation."""
    from tinygrad_lstm.training.language_model import load_model, sample

    if not args.prompt:
        raise UsageError("--prompt is empty; give at least one character")
    path = model_file(args.checkpoint)
    model, tree = load_model(path)
    try:
        text = sample(model, tree["vocabulary"], args.prompt, args.length, args.temperature, Generator(args.seed))
    except OutOfRangeError as error:
        raise UsageError(f"--prompt: {error}") from None
    print((args.prompt + text).lstrip("\n") if args.prompt == "\n" else args.prompt + text)
    return 0
