"""Recurrent models on the CPU, with the autodiff in plain sight.

>>> import tinygrad_lstm as tg
>>> from tinygrad_lstm import ops
>>> x = tg.tensor([3.0, -1.0], requires_grad=True)
>>> y = (x * x).sum() + ops.relu(x).sum()
>>> y.backward()
>>> x.grad.tolist()
[7.0, -2.0]
"""

import importlib
from typing import Any

from tinygrad_lstm import binding as _binding  # last: every module of the engine is imported now
from tinygrad_lstm import ops
from tinygrad_lstm._version import __version__
from tinygrad_lstm.autodiff import (
    checkpoint,
    grad,
    gradcheck,
    hessian,
    hvp,
    jacobian,
    jvp,
    value_and_grad,
    vjp,
)
from tinygrad_lstm.compiler.function import compile
from tinygrad_lstm.compiler.report import explain
from tinygrad_lstm.declare import primitive
from tinygrad_lstm.errors import (
    ArgumentError,
    CheckpointError,
    DependencyError,
    DTypeError,
    Error,
    FileError,
    GradcheckError,
    GraphError,
    OutOfRangeError,
    ShapeError,
    TraceError,
    UnsupportedError,
)
from tinygrad_lstm.hints import MissingNameError as _MissingNameError
from tinygrad_lstm.kernels.threads import get_num_threads, set_num_threads
from tinygrad_lstm.primitive import REGISTRY, Primitive
from tinygrad_lstm.program import Program
from tinygrad_lstm.random import Generator, seed
from tinygrad_lstm.serialization import load, save
from tinygrad_lstm.tape import Record, Tape, eager, name, no_grad, scope
from tinygrad_lstm.tensor import Tensor, asarray, tensor

_binding.mark_internal()

__all__ = [
    "REGISTRY", "ArgumentError", "CheckpointError", "DTypeError", "DependencyError", "Error", "FileError",
    "Generator", "GradcheckError", "GraphError", "OutOfRangeError", "Primitive", "Program", "Record", "ShapeError",
    "Tape", "Tensor", "TraceError", "UnsupportedError", "__version__", "asarray", "checkpoint", "compile", "data",
    "eager", "explain", "get_num_threads", "grad", "gradcheck", "hessian", "hvp", "inspect", "interop", "jacobian",
    "jvp", "load", "name", "nn", "no_grad", "ops", "optim", "primitive", "save", "scope", "seed", "set_num_threads",
    "tensor", "training", "value_and_grad", "vjp",
]  # fmt: skip

_SUBPACKAGES = frozenset({"data", "inspect", "interop", "nn", "optim", "training"})


def __getattr__(name: str) -> Any:
    # ``tg.nn`` without an import of its own; importing the engine alone stays quick.
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise _MissingNameError(__name__, name)
