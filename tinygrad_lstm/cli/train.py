"""Train a character-level language model by truncated backpropagation through time.

Without --text it trains on the English text that ships inside Python (the pages of help()), so
nothing is downloaded.  The output folder gets the checkpoints best.safetensors and last.safetensors,
metrics.csv, and loss.png when matplotlib is there.  Ctrl-C stops after the step under way, with a
checkpoint; --resume goes on from it as if it had never stopped.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygrad_lstm.cli.evaluate import training_corpus
from tinygrad_lstm.cli.options import LAST, UsageError, duration, explicit, fraction, integer, number, program
from tinygrad_lstm.cli.run_folder import RunFolder, check_writable, new_folder, newest_run
from tinygrad_lstm.errors import CheckpointError, Error, ShapeError

if TYPE_CHECKING:
    from tinygrad_lstm.data import TextCorpus
    from tinygrad_lstm.training import Trainer

NAME = "train"
HELP = "train a character-level language model"

# What a run is made of; a checkpoint stores it, and a resumed run cannot change it.
DEFAULTS: dict[str, Any] = {
    "cell": "lstm", "hidden": 128, "layers": 2, "dropout": 0.1, "embedding": 64, "dtype": "float32",
    "seq_len": 100, "batch": 16, "steps": 8000, "epochs": None, "lr": 6e-3, "clip": 1.0, "seed": 0,
    "held_out": 0.05, "eval_every": None,
}  # fmt: skip
SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""

    def add(group: Any, name: str, help: str, **how: Any) -> None:
        default = DEFAULTS[name[2:].replace("-", "_")]
        group.add_argument(name, help=help if default is None else f"{help} (default: {default})", **how)

    group = parser.add_argument_group("text")
    group.add_argument("--text", metavar="FILE", help="a UTF-8 text file (default: the text that ships inside Python)")
    add(group, "--held-out", "the fraction at the end that is held out", type=number(0, False), metavar="F")
    group = parser.add_argument_group("model")
    add(group, "--cell", "kind of recurrent layer", choices=["lstm", "gru", "rnn"])
    add(group, "--hidden", "units of each layer", type=integer(1), metavar="N")
    add(group, "--layers", "recurrent layers", type=integer(1), metavar="N")
    add(group, "--dropout", "dropout before, between and after the layers", type=fraction, metavar="P")
    add(group, "--embedding", "width of the character vectors, 0 for one-hot", type=integer(0), metavar="N")
    add(group, "--dtype", "precision", choices=["float32", "float64"])
    group = parser.add_argument_group("training")
    add(group, "--seq-len", "steps that the gradient goes back", type=integer(1), metavar="N")
    add(group, "--batch", "streams that are read side by side", type=integer(1), metavar="N")
    total = group.add_mutually_exclusive_group()
    add(total, "--steps", "steps in all; the schedule depends on it", type=integer(1), metavar="N")
    add(total, "--epochs", "passes over the text in place of --steps", type=integer(1), metavar="N")
    add(group, "--lr", "largest learning rate of Adam", type=number(0, False), metavar="RATE")
    add(group, "--clip", "largest norm of the gradient", type=number(0, False), metavar="NORM")
    add(group, "--seed", "seed of parameters and dropout", type=integer(0), metavar="N")
    add(group, "--eval-every", "steps between evaluations (default: a twentieth of all)", type=integer(1), metavar="N")
    group.add_argument(
        "--time-limit", type=duration, metavar="TIME", help="stop after 90, 90s, 3m or 1h; the schedule stays as it is"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", metavar="FOLDER", help="a new folder (default: runs/char-lm-1, or the next free number)"
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help=f"go on with a run: its {LAST} or its folder (default: --out, or the newest run in runs/)",
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but the result")


def run(args: argparse.Namespace) -> int:
    """Train, and report; the exit status."""
    from tinygrad_lstm.training.callbacks import ProgressBar

    saved, path = (None, None) if args.resume is None else find_run(args)
    options, corpus = options_of(args, saved)
    trainer, streams, held_out, config = build_run(options, corpus)
    if saved is not None:
        trainer.load_state_dict({**saved["trainer"], "model": saved["model"]})
    folder = folder_of(args, path)
    about = {"options": options, "corpus": corpus_facts(options, corpus)}
    files = RunFolder(folder, config, about, corpus.vocabulary)
    if saved is not None and not (folder / LAST).exists():
        files.write(trainer)  # a resumed run that goes on in another folder is complete there too
    complete = saved is not None and trainer.finished
    total = trainer.total or options["steps"] or options["epochs"] * len(streams)
    every = options["eval_every"] or max(1, total // 20)
    if complete:
        print(
            f"the run in {folder} is complete already: {trainer.step} of {total} steps, nothing is left to train; "
            "for more steps start a new run"
        )
    elif not args.quiet:
        introduce(trainer, corpus, options, folder, total)
        tokens = options["batch"] * options["seq_len"]
        bits = lambda loss, _: {"bits": f"{loss / math.log(2):.3f}"}
        trainer.callbacks.append(ProgressBar("tok", tokens, bits))
    with stopping_on_signals(trainer) as received:
        trainer.fit(
            streams,
            steps=None if saved is not None else total,
            validation=held_out,
            validate_every=every,
            time_limit=args.time_limit,
            checkpoint=files.write,
            checkpoint_every=every,
        )
    if received:
        again = f"{program()} train --resume {folder}"
        print(f"stopped by {SIGNALS[received[0]]} after step {trainer.step} of {total}; go on with: {again}")
        return 128 + received[0]
    report(args, trainer, corpus, files, total)
    return 0


def find_run(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """The checkpoint that ``--resume`` means: (its tree, its path)."""
    from tinygrad_lstm.training.language_model import load_model

    if args.resume:
        path = Path(args.resume)
    elif args.out is not None:
        path = Path(args.out)
    else:
        path = newest_run()
    if path.is_dir():
        path = path / LAST
    _, tree = load_model(path)
    if "trainer" not in tree:
        raise CheckpointError(f"{path} holds a model only, no run that could go on; resume from {LAST}")
    return tree, path


def options_of(args: argparse.Namespace, saved: dict[str, Any] | None) -> tuple[dict[str, Any], TextCorpus]:
    """The options of the run, and its text."""
    from tinygrad_lstm.data import TextCorpus

    given = explicit(args, DEFAULTS)
    if saved is None:
        options = {**DEFAULTS, **given}
        if options["held_out"] >= 1:
            raise UsageError(f"--held-out {options['held_out']:g} is not below 1")
        if options["epochs"] is not None:
            options["steps"] = None
        if args.text is None:
            return options, TextCorpus.python_topics(options["held_out"])
        return options, TextCorpus.from_file(args.text, options["held_out"])
    options = saved["options"]
    for name, value in given.items():
        if options[name] != value:
            raise UsageError(
                f"--{name.replace('_', '-')} {value} does not fit the run to resume, which has {options[name]}; "
                "leave it out, or start a new run"
            )
    return options, training_corpus(saved["corpus"], args.text)


def build_run(options: dict[str, Any], corpus: TextCorpus) -> tuple[Trainer, Any, Any, dict[str, Any]]:
    """(trainer, training streams, held-out streams, the model's config)."""
    from tinygrad_lstm import nn, optim
    from tinygrad_lstm.data import TextStreams
    from tinygrad_lstm.random import seed
    from tinygrad_lstm.training import Trainer, WarmupCosine
    from tinygrad_lstm.training.language_model import build, held_out_streams

    config = {name: options[name] for name in ("hidden", "layers", "cell", "embedding", "dropout", "dtype")}
    try:
        streams = TextStreams(corpus.train, options["batch"], options["seq_len"])
    except ShapeError as error:
        raise Error(f"{corpus.name} is too short for --batch and --seq-len: {error}") from None
    seed(options["seed"])
    model = build(config, len(corpus.vocabulary))
    trainer = Trainer(
        model,
        optim.Adam(model.parameters(), lr=options["lr"]),
        nn.cross_entropy,
        schedule=WarmupCosine(warmup=100, floor=0.02),
        clip_norm=options["clip"],
        carry_state=True,
    )
    return trainer, streams, held_out_streams(corpus), config


def folder_of(args: argparse.Namespace, resumed: Path | None) -> Path:
    """Where the run writes: a resumed run where it was, every other one into a folder of its own."""
    if resumed is not None and resumed.name == LAST and (args.out is None or same_folder(args.out, resumed.parent)):
        check_writable(resumed.parent)
        return resumed.parent
    return new_folder(args.out)


def same_folder(a: str, b: Path) -> bool:
    """Whether two paths name one folder."""
    return Path(a).resolve() == b.resolve()


def corpus_facts(options: dict[str, Any], corpus: TextCorpus) -> dict[str, Any]:
    """What a checkpoint tells about its text."""
    return {
        "path": corpus.path,
        "sha256": corpus.sha256,
        "characters": len(corpus.text),
        "held_out": options["held_out"],
    }


def introduce(trainer: Trainer, corpus: TextCorpus, options: dict[str, Any], folder: Path, total: int) -> None:
    """What is trained on what, before the bar."""
    parameters = sum(p.size for p in trainer.model.parameters())
    start = f"from step {trainer.step} " if trainer.step else ""
    print(
        f"text    {corpus.name}: {len(corpus.text):,} characters, {len(corpus.vocabulary)} different, "
        f"the last {len(corpus.held_out):,} held out\n"
        f"        sha256 {corpus.sha256}\n"
        f"model   {options['layers']} x {options['hidden']} {options['cell'].upper()}, "
        f"{parameters:,} parameters, {options['dtype']}\n"
        f"run     {start}to step {total}, each with {options['batch']} streams of {options['seq_len']} characters; "
        f"seed {options['seed']}\n"
        f"folder  {folder}",
        flush=True,
    )


def report(args: argparse.Namespace, trainer: Trainer, corpus: TextCorpus, files: RunFolder, total: int) -> None:
    """The result: held-out bits per character of the best model, a sample of it, and the files."""
    from tinygrad_lstm.random import Generator
    from tinygrad_lstm.training.language_model import bits_per_character, sample

    hint = files.write_curve(trainer)
    done = trainer.step
    if trainer.step < total:
        print(f"stopped by the time limit after step {done} of {total}; go on with --resume {files.folder}")
    if trainer.best is not None:
        trainer.load_best()
        done = trainer.best["step"]
    bits = bits_per_character(trainer.model, corpus.held_out)
    print(f"held out: {bits:.4f} bits per character (model of step {done})")
    if args.quiet:
        return
    prompt = "The " if set("The ") <= set(corpus.vocabulary) else corpus.text[:1]
    print(f"\n{prompt}{sample(trainer.model, corpus.vocabulary, prompt, 500, 0.7, Generator(0))}\n")
    print(f"files in {files.folder}: {', '.join(sorted(p.name for p in files.folder.iterdir() if p.is_file()))}")
    if hint is not None:
        print(hint)
    sampling = f"sample {files.folder} --prompt {shlex.quote(prompt)} --temperature 0.7"
    print(f"more text: {program()} {sampling}", flush=True)


@contextmanager
def stopping_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Let the first Ctrl-C or SIGTERM end the run after its step; the second one ends it at once."""
    from tinygrad_lstm.training import Callback

    received: list[int] = []

    class Stop(Callback):
        def on_step(self, trainer: Trainer, row: dict[str, float]) -> None:
            if received:
                trainer.stop("signal")

    def handle(number: int, frame: Any) -> None:
        # Nothing else happens here: the handler may run in the middle of anything.
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    trainer.callbacks.append(Stop())
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handle) for number in SIGNALS if in_main_thread}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
