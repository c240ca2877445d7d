"""What ``inspect``, ``gradcheck`` and ``bench`` look at: a cell by name, a checkpoint, or a class in a user's file."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.cli.options import UsageError, integer, model_file
from tinygrad_lstm.errors import DTypeError, Error
from tinygrad_lstm.hints import did_you_mean

__all__ = ["CELLS", "LAYERS", "Subject", "add_subject", "named", "sequence", "subject_of"]

# name -> class in nn, and what it takes beside the sizes
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTMCell", {}), "gru": ("GRUCell", {}), "rnn": ("RNNCell", {}), "peephole": ("PeepholeLSTMCell", {}),
    "layer-norm": ("LayerNormLSTMCell", {}), "zoneout": ("Zoneout", {}),
}  # fmt: skip
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm-layers": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "gru-layers": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "rnn-layers": ("RNN", {"num_layers": 2, "bidirectional": True}),
}


class Subject(NamedTuple):
    """A module, how to call it in messages, the checkpoint's tree if it came from one, whether it is a user's."""

    module: Any
    name: str
    checkpoint: dict[str, Any] | None = None
    is_users: bool = False

    @contextmanager
    def explained(self) -> Iterator[None]:
        """One line for whatever the code of a user's module raises."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if not self.is_users or isinstance(error, (Error, OSError)):
                raise
            line = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(line.filename)}:{line.lineno}"
            raise Error(f"{self.name} failed ({place}): {type(error).__name__}: {error}") from None


def add_subject(parser: argparse.ArgumentParser, default: str | None = None, several: bool = False) -> None:
    """Add the argument WHAT and the sizes of what is made here."""
    names = ", ".join((*CELLS, *LAYERS))
    parser.add_argument(
        "what",
        metavar="WHAT",
        nargs="*" if several else None if default is None else "?",
        default=default,
        help=f"one of {names}; a checkpoint, or a run's folder; or FILE.py:NAME, a Module or what makes one"
        + ("" if default is None or several else f" (default: {default})"),
    )
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of what is drawn (default: 0)")


def subject_of(args: argparse.Namespace, what: str, dtype: Any) -> Subject:
    """The module that WHAT means, with ``args.input`` and ``args.hidden`` where it is made here."""
    from tinygrad_lstm.random import seed

    seed(args.seed)
    if what in CELLS or what in LAYERS:
        return Subject(named(what, args.input, args.hidden, dtype), what)
    file, separator, name = what.rpartition(":")
    if separator and file.endswith(".py"):
        return Subject(_from_file(file, name, args.input, args.hidden), what, is_users=True)
    if what.endswith(".py") and os.path.isfile(what):
        there = _modules_in(_imported(what))
        raise UsageError(
            f"{what} is Python; name one of its modules: {', '.join(f'{what}:{key}' for key in there)}"
            if there
            else f"{what} has no Module; write one, and name it as {what}:NAME"
        )
    if os.path.exists(what):
        from tinygrad_lstm.training.language_model import load_model

        model, tree = load_model(model_file(what))
        return Subject(model.eval(), what, tree)
    if os.sep in what or what.endswith((".safetensors", ".py")):
        raise FileNotFoundError(2, os.strerror(2), what)
    names = (*CELLS, *LAYERS)
    raise UsageError(
        f"{what!r} is none of {', '.join(names)}, no file or folder, and not FILE.py:NAME{did_you_mean(what, names)}"
    )


def named(what: str, inputs: int, hidden: int, dtype: Any) -> Any:
    """A cell or layer of the library by its name here."""
    from tinygrad_lstm import nn

    kind, options = (CELLS | LAYERS)[what]
    if kind == "Zoneout":
        return nn.Zoneout(nn.LSTMCell(inputs, hidden, dtype=dtype)).eval()
    return getattr(nn, kind)(inputs, hidden, dtype=dtype, **options)


def _from_file(path: str, name: str, inputs: int, hidden: int) -> Any:
    """A Module of a user's file: an object, or what a class or function of no argument, or of two sizes, makes."""
    from tinygrad_lstm.nn import Module

    module = _imported(path)
    if not hasattr(module, name):
        raise UsageError(f"{path} has no {name!r}; its modules are {', '.join(_modules_in(module)) or 'none'}")
    found = getattr(module, name)
    if isinstance(found, Module):
        return found
    if not callable(found):
        raise UsageError(f"{path}:{name} is a {type(found).__name__}, expected a Module, or what makes one")
    needed = _required(found)
    if len(needed) not in (0, 2):
        raise UsageError(
            f"{path}:{name} takes {', '.join(needed)}; give a class or function that takes nothing, "
            "or two sizes (input and hidden)"
        )
    try:
        made = found(inputs, hidden) if needed else found()
    except (Exception, SystemExit) as error:
        raise Error(f"{path}:{name} cannot be made: {type(error).__name__}: {error}") from None
    if not isinstance(made, Module):
        raise DTypeError(f"{path}:{name} made a {type(made).__name__}, expected a Module")
    return made


def _imported(path: str) -> ModuleType:
    """A user's file as a module."""
    if not Path(path).is_file():
        raise FileNotFoundError(2, os.strerror(2), path)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script may end with sys.exit(main())
        raise Error(f"{path} cannot be imported: {type(error).__name__}: {error}") from None
    return module


def _modules_in(file: ModuleType) -> list[str]:
    """The names of the Modules, and of the classes of such, that a file defines itself."""
    from tinygrad_lstm.nn import Module

    def is_one(value: Any) -> bool:
        if isinstance(value, type):
            return issubclass(value, Module) and value.__module__ == file.__name__
        return isinstance(value, Module)

    return [key for key, value in vars(file).items() if not key.startswith("_") and is_one(value)]


def _required(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional and p.default is p.empty]


def sequence(subject: Subject, steps: int, batch: int, width: int, seed: int) -> np.ndarray:
    """An input ``(T, B, width)`` of standard normal numbers, in the dtype of the module's parameters."""
    dtypes = [parameter.dtype for parameter in subject.module.parameters()]
    rng = np.random.default_rng(seed)
    return rng.standard_normal((steps, batch, width)).astype(dtypes[0] if dtypes else np.float32)
