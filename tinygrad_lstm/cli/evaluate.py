"""Bits per character of a language model: on the held-out part of its own text, or on another text."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from tinygrad_lstm.cli.options import UsageError, model_file
from tinygrad_lstm.errors import Error

NAME = "evaluate"
HELP = "held-out bits per character of a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run")
    parser.add_argument("--text", metavar="FILE", help="evaluate the whole of FILE (default: what training held out)")
    parser.add_argument(
        "--skip-unknown", action="store_true", help="leave out characters of FILE that the model does not know"
    )


def run(args: argparse.Namespace) -> int:
    """Print the bits per character."""
    from tinygrad_lstm.data.text import encode, read_text
    from tinygrad_lstm.training.language_model import bits_per_character, load_model

    if args.skip_unknown and args.text is None:
        raise UsageError("--skip-unknown is for another text (--text FILE); the model knows all of its own")
    path = model_file(args.checkpoint)
    model, tree = load_model(path)
    skipped = ""
    if args.text is not None:
        text, skipped = known_part(read_text(args.text), tree["vocabulary"], args.text, args.skip_unknown)
        ids, what = encode(text, tree["vocabulary"]), args.text
        if len(ids) < 2:
            raise Error(
                f"{args.text} has {len(ids)} characters: at least 2 are needed, since the first is not predicted"
            )
    else:
        corpus = training_corpus(tree["corpus"])
        ids, what = corpus.held_out, f"the held-out part of {corpus.name}"
    bits = bits_per_character(model, ids)
    print(f"{bits:.4f} bits per character on {what} ({len(ids):,} characters{skipped})")
    return 0


def known_part(text: str, vocabulary: str, name: str, skip: bool) -> tuple[str, str]:
    """The text without the characters that a model does not know, and a note of them; raises unless they may go."""
    unknown = Counter(text)
    for character in vocabulary:
        del unknown[character]
    if not unknown:
        return text, ""
    count = unknown.total()
    shown = ", ".join(f"{character!r} ({times:,})" for character, times in unknown.most_common(8))
    shown += f" and {len(unknown) - 8:,} more kinds" if len(unknown) > 8 else ""
    if not skip:
        raise Error(
            f"{name} has {count:,} characters, of {len(text):,}, that the model does not know: {shown}; replace them, "
            "or leave them out with --skip-unknown"
        )
    return text.translate(dict.fromkeys(map(ord, unknown))), f"; {count:,} unknown ones were skipped: {shown}"


def training_corpus(about: dict[str, Any], text: str | None = None) -> Any:
    """The text that a checkpoint was trained on, from where it was or from ``text``; checked by its hash."""
    from tinygrad_lstm.data import TextCorpus

    path = text if text is not None else about["path"]
    fraction = about["held_out"]
    corpus = TextCorpus.python_topics(fraction) if path is None else TextCorpus.from_file(path, fraction)
    if corpus.sha256 != about["sha256"]:
        why = "another version of Python ships another text" if path is None else "it was changed, or is another file"
        raise Error(
            f"{corpus.name} is not the text of the training: its sha256 is {corpus.sha256[:12]}..., the checkpoint's "
            f"{about['sha256'][:12]}...; {why}"
        )
    return corpus
