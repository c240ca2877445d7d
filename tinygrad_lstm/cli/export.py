"""Write a trained language model in a format that other programs read: ONNX or safetensors.

An ONNX model takes token ids (steps, batch), int64, and gives logits (steps, batch, vocabulary) and the recurrent
state behind the last step; with --state it also takes the state to start from, so that text can be generated step by
step.  Its metadata hold the vocabulary: the characters in the order of their ids.  A safetensors file holds the
parameters alone, under PyTorch's names, and the same metadata.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tinygrad_lstm.cli.options import UsageError, model_file
from tinygrad_lstm.errors import FileError

NAME = "export"
HELP = "write a checkpoint as ONNX or safetensors"

SUFFIXES = {".onnx": "onnx", ".safetensors": "safetensors"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run")
    parser.add_argument("output", metavar="FILE", help="the file to write: name.onnx or name.safetensors")
    parser.add_argument(
        "--format", choices=sorted(SUFFIXES.values()), help="in place of what the name of FILE ends with"
    )
    parser.add_argument("--state", action="store_true", help="ONNX: the initial state is an input of the model, too")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    from tinygrad_lstm.training.language_model import load_model

    output = Path(args.output)
    kind = args.format or SUFFIXES.get(output.suffix.lower())
    if kind is None:
        raise UsageError(f"{output} ends with neither {' nor '.join(SUFFIXES)}; give --format")
    if args.state and kind != "onnx":
        raise UsageError("--state is about ONNX models, a safetensors file holds parameters alone")
    path = model_file(args.checkpoint)
    model, tree = load_model(path)
    if output.exists() and output.resolve() == path.resolve():
        raise FileError(f"{output} is the checkpoint itself; give another file")
    if output.exists() and not args.force:
        raise FileError(f"{output} exists already; give another file, or --force to replace it")
    metadata = {"vocabulary": tree["vocabulary"], "config": json.dumps(tree["config"])}
    if kind == "onnx":
        inputs = write_onnx(model, output, metadata, args.state)
        print(f"{output}: ONNX model of {path}; inputs {', '.join(inputs)}")
    else:
        from tinygrad_lstm import interop

        interop.save_safetensors(output, model, metadata)
        print(f"{output}: {sum(p.size for p in model.parameters()):,} parameters of {path}")
    return 0


def write_onnx(model: Any, output: Path, metadata: dict[str, str], with_state: bool) -> list[str]:
    """Write the model; the names of its inputs."""
    import numpy as np

    from tinygrad_lstm import interop
    from tinygrad_lstm.tape import no_grad
    from tinygrad_lstm.tree import flatten

    tokens = np.zeros((2, 1), np.int64)
    with no_grad():
        _, state = model(tokens)
    parts = ["h", "c"][: len(flatten(state)[0])]
    inputs = ["tokens", *(f"{part}_0" for part in parts)] if with_state else ["tokens"]
    interop.to_onnx(
        model, output, (tokens, state) if with_state else tokens,
        input_names=inputs, output_names=["logits", *(f"{part}_n" for part in parts)], metadata=metadata,
    )  # fmt: skip
    return inputs
