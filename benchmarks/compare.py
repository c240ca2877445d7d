"""This library against its peers, with the limit of the machine beside them.

    python benchmarks/compare.py                              # everything: between one and two hours
    python benchmarks/compare.py --suite step --shapes small medium --threads 1
    python benchmarks/compare.py --json results.json --plot results.png
    python benchmarks/compare.py --short                      # under a minute; shows that it runs

Every contender runs in a process of its own, with the same number of threads; in every round each of them times one
batch of calls, then the next one does.  Reported are medians over the rounds; a ratio is the median of the
ratios within the rounds.  Before anything is timed, the results are compared with float64: a contender that computes
something else is an error, and the exit status is 1.  Only what is installed takes part.  See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from peers.contenders import CONTENDERS
from peers.figure import plot
from peers.report import bounds, geometric_mean, headline, machine, peaks, tables
from peers.run import Run, Settings
from peers.suites import SUITES, run_suite
from peers.work import SHAPES

FULL = Settings(tuple(SHAPES), tuple(SHAPES), ("small", "medium", "large"), ("small", "medium"))
SHORT = Settings(
    shapes=("tiny",), forward_shapes=("tiny",), custom_shapes=("tiny",), cells_shapes=("tiny",),
    cells=("minimal-gated",), own_cells=("gru",), rounds=2, budget=0.01,
    training="character-tiny", memory="small", memory_steps=6, memory_budget=("small", 0.4),
    first=(("forward", "lstm", "tiny"),), repeats=1, other_cell=False,
    only=("ours", "torch", "torch loop, trim off", "jax concat", "NumPy by hand", "autograd", "onnxruntime"),
    peaks=("peak NumPy", "peak ours"),
)  # fmt: skip


def settings(options: argparse.Namespace) -> Settings:
    """From the command line."""
    base = SHORT if options.short else FULL
    changes = {}
    if options.shapes:
        changes = {
            "shapes": tuple(options.shapes),
            "forward_shapes": tuple(options.shapes),
            "custom_shapes": tuple(options.shapes),
            "cells_shapes": tuple(options.shapes),
        }
    if options.cells:  # minimal-gated belongs to both suites
        changes["cells"] = tuple(cell for cell in options.cells if cell in FULL.cells)
        changes["own_cells"] = tuple(cell for cell in options.cells if cell in FULL.own_cells)
    if options.only:
        changes["only"] = tuple(options.only)
    for name in ("rounds", "budget", "repeats"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    return Settings(**{**base.__dict__, **changes})


def count(text: str) -> int:
    """A positive int of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def seconds(text: str) -> float:
    """A positive time of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return value


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--short", "--smoke", action="store_true", help="small shapes, few rounds, one thread: under a minute"
    )
    p.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="which ones (default: all)")
    p.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="of step, forward, custom and cells")
    cells = list(dict.fromkeys(FULL.cells + FULL.own_cells))
    p.add_argument("--cells", nargs="+", choices=cells, metavar="CELL", help=f"of custom and cells: {', '.join(cells)}")
    p.add_argument("--threads", nargs="+", type=count, help="numbers of threads, one after the other (default: 1 2)")
    p.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="NAME", help="these contenders")
    p.add_argument("--rounds", type=count, help=f"default {FULL.rounds}")
    p.add_argument("--budget", type=seconds, help=f"seconds per batch, default {FULL.budget}")
    p.add_argument("--repeats", type=count, help=f"processes per first call, default {FULL.repeats}")
    p.add_argument("--json", metavar="FILE", help="write everything there")
    p.add_argument("--plot", metavar="FILE", help="draw the ratios there (needs matplotlib)")
    return p


def checked(p: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; what could not be written after an hour or two is refused now."""
    options = p.parse_args(arguments)
    for path in filter(None, (options.json, options.plot)):
        if not Path(path).absolute().parent.is_dir():
            p.error(f"{path}: there is no such folder")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        p.error("--plot needs matplotlib (pip install matplotlib)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; 0, or 1 when a contender failed or was wrong."""
    options = checked(parser(), arguments)
    threads = options.threads or ([1] if options.short else [1, 2])
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder, Run(settings(options), folder, say) as run:
        about = machine()
        try:
            for number in threads:
                for suite in options.suite:
                    run.say(f"{suite}, {number} thread{'s' if number > 1 else ''}")
                    run_suite(run, suite, number)
        except KeyboardInterrupt:  # what was measured until then is still reported
            run.errors.append("interrupted: what follows was not measured")
        bounds(run)
    print(headline(about, run) + "\n")
    print(tables(run))
    for text in run.notes:
        print(f"note: {text}")
    for text in run.errors:
        print(f"ERROR: {text}", file=sys.stderr)
    print(f"{time.perf_counter() - began:.0f} s")
    if options.json:
        means = {
            f"{suite} {number}": geometric_mean([r for r in run.rows if (r["suite"], r["threads"]) == (suite, number)])
            for suite in options.suite for number in threads
        }  # fmt: skip
        report = {
            "machine": about, "settings": run.settings.__dict__, "rows": run.rows, "geometric_means": means,
            "peak_flop_per_second": peaks(run), "matrix_products": run.rates, "notes": run.notes, "errors": run.errors,
        }  # fmt: skip
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(run, options.plot)
    return 1 if run.errors else 0


if __name__ == "__main__":
    sys.exit(main())
