"""Initial values of parameters: functions of a Parameter that overwrite it and return it.

Instead of a Parameter they take a shape, and return a new float32 Parameter::

    self.U = nn.init.orthogonal((hidden, hidden))

All take ``generator`` (a :class:`tinygrad_lstm.Generator`; the default one that ``tg.seed`` seeds without it)
and draw in float64, so that float32 and float64 models start from the same numbers up to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_lstm.checks import check_int, check_number
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.hints import MissingNameError
from tinygrad_lstm.kernels.pool import on_lines
from tinygrad_lstm.ops.random import check_generator
from tinygrad_lstm.random import Generator, default_generator
from tinygrad_lstm.tensor import Tensor, read

__all__ = [
    "constant", "copy", "kaiming_uniform", "lstm_default", "normal", "orthogonal", "torch_default", "uniform",
    "xavier_normal", "xavier_uniform", "zeros",
]  # fmt: skip


def _filled(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let an initialiser take a shape in place of a Parameter."""

    who = draw.__name__

    @functools.wraps(draw)
    def initialiser(parameter: Any, *args: Any, **options: Any) -> Tensor:
        if isinstance(parameter, (tuple, list, int, np.integer)):
            from tinygrad_lstm.nn.module import Parameter

            lengths = tuple(parameter) if isinstance(parameter, (tuple, list)) else (parameter,)
            for length in lengths:
                check_int(f"{who}: every length of a shape", length, 0)
            parameter = Parameter(np.zeros(lengths, np.float32))
        if not isinstance(parameter, Tensor):
            raise DTypeError(f"{who}: a Parameter or a shape is needed, found {parameter!r:.60}")
        _check_leaf(who, parameter)
        return draw(parameter, *args, **options)

    return initialiser


def _check_leaf(who: str, parameter: Tensor) -> None:
    """Raise for a part of a Parameter: an index gives a tensor of its own, which would be filled to no effect."""
    if not parameter.is_leaf:
        raise ArgumentError(
            f"{who}: the tensor of shape {parameter.shape} was computed, and what it was computed from would stay as "
            "it is; a part of a Parameter is set by its data: p.data[2:4] = values"
        )


def _source(who: str, generator: Generator | None) -> Generator:
    """Where an initialiser draws from."""
    return check_generator(who, generator) or default_generator()


def copy(parameter: Tensor, values: np.ndarray) -> Tensor:
    """The given values, broadcast to the parameter's shape and cast to its dtype."""
    _check_leaf("copy", parameter)
    given = read(values)
    try:
        grown = np.broadcast_to(given, parameter.shape)
    except ValueError:
        raise ShapeError(f"copy: values of shape {given.shape} for a parameter of shape {parameter.shape}") from None
    parameter._replace(on_lines(np.asarray(grown, order="C"), parameter.dtype))
    return parameter


def _fans(shape: tuple[int, ...], who: str) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight ``(out, in, ...)``."""
    if len(shape) < 2:
        raise ShapeError(f"{who}: a weight with at least two axes (out, in) is needed, found shape {shape}")
    rest = math.prod(shape[2:])
    return shape[1] * rest, shape[0] * rest


@_filled
def constant(parameter: Tensor, value: float) -> Tensor:
    """Every element ``value``."""
    check_number("constant: value", value)
    return copy(parameter, np.asarray(value, np.float64))


@_filled
def zeros(parameter: Tensor) -> Tensor:
    """Every element 0."""
    return constant(parameter, 0.0)


@_filled
def uniform(parameter: Tensor, low: float = 0.0, high: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Uniform on ``[low, high)``."""
    check_number("uniform: low", low)
    check_number("uniform: high", high)
    if not low <= high or not math.isfinite(high - low):
        raise ArgumentError(f"uniform: both are finite, low is at most high, found low={low}, high={high}")
    return copy(parameter, _source("uniform", generator).uniform(low, high, parameter.shape))


@_filled
def normal(parameter: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Normal with the given mean and standard deviation."""
    check_number("normal: mean", mean)
    check_number("normal: std", std)
    if not std >= 0:
        raise ArgumentError(f"normal: std is not negative, found {std}")
    return copy(parameter, _source("normal", generator).normal(mean, std, parameter.shape))


@_filled
def xavier_uniform(parameter: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Uniform with bound ``gain * sqrt(6 / (fan_in + fan_out))`` (Glorot & Bengio 2010); weight ``(out, in)``."""
    bound = gain * math.sqrt(6.0 / max(sum(_fans(parameter.shape, "xavier_uniform")), 1))
    return uniform(parameter, -bound, bound, generator)


@_filled
def xavier_normal(parameter: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Normal with standard deviation ``gain * sqrt(2 / (fan_in + fan_out))`` (Glorot & Bengio 2010)."""
    std = gain * math.sqrt(2.0 / max(sum(_fans(parameter.shape, "xavier_normal")), 1))
    return normal(parameter, 0.0, std, generator)


@_filled
def kaiming_uniform(parameter: Tensor, a: float = 0.0, generator: Generator | None = None) -> Tensor:
    """Uniform with bound ``sqrt(6 / ((1 + a^2) fan_in))`` for a leaky relu of slope a (He et al. 2015)."""
    fan_in, _ = _fans(parameter.shape, "kaiming_uniform")
    bound = math.sqrt(6.0 / ((1.0 + a * a) * max(fan_in, 1)))
    return uniform(parameter, -bound, bound, generator)


@_filled
def orthogonal(parameter: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Rows or columns (the fewer) orthonormal, times gain (Saxe, McClelland & Ganguli 2014)."""
    _fans(parameter.shape, "orthogonal")
    return copy(parameter, gain * _orthogonal(parameter.shape, _source("orthogonal", generator)))


def _orthogonal(shape: tuple[int, ...], generator: Generator) -> np.ndarray:
    rows, columns = shape[0], math.prod(shape[1:])
    drawn = generator.normal(size=(max(rows, columns), min(rows, columns)))
    if not drawn.size:
        return np.zeros(shape)
    q, r = np.linalg.qr(drawn)
    q *= np.sign(np.diagonal(r))  # makes the distribution uniform (Mezzadri 2007)
    return (q if rows >= columns else q.T).reshape(shape)


def _blocks(weight: Tensor, gates: int, draw: Any) -> None:
    """Initialise each gate's block of rows on its own: the fans are those of one gate."""
    height = weight.shape[0] // gates
    copy(weight, np.concatenate([draw((height, *weight.shape[1:])) for _ in range(gates)]))


def lstm_default(module: Any, generator: Generator | None = None) -> Any:
    """What this package's recurrent cells and layers start from; returns the module.

    Recurrent weights orthogonal and input weights Glorot-uniform, block by block for every gate; biases 0,
    except ``bias_ih`` of an LSTM's forget gate, which is 1 (Jozefowicz, Zaremba & Sutskever 2015).
    """
    _check_module(module, "lstm_default")
    drawn = _source("lstm_default", generator)
    for name, parameter in module.named_parameters():
        leaf = name.rpartition(".")[2]
        gates = _gates_of(leaf, parameter, module)
        if leaf.startswith("weight_hh"):
            _blocks(parameter, gates, lambda shape: _orthogonal(shape, drawn))
        elif leaf.startswith("weight_ih"):
            _blocks(parameter, gates, lambda shape: _glorot(shape, drawn))
        elif leaf.startswith("weight_hr"):
            xavier_uniform(parameter, generator=drawn)
        elif leaf.startswith("bias"):
            values = np.zeros(parameter.shape)
            if leaf.startswith("bias_ih") and gates == 4:
                quarter = len(values) // 4
                values[quarter : 2 * quarter] = 1.0
            copy(parameter, values)
        elif leaf in ("weight_ci", "weight_cf", "weight_co"):
            zeros(parameter)
    return module


def _check_module(module: Any, who: str) -> None:
    if not hasattr(module, "named_parameters"):
        raise DTypeError(f"{who}: a Module is needed, found {module!r:.60}")


def _glorot(shape: tuple[int, ...], generator: Generator) -> np.ndarray:
    bound = math.sqrt(6.0 / max(sum(shape), 1))
    return generator.uniform(-bound, bound, shape)


def _gates_of(leaf: str, parameter: Tensor, module: Any) -> int:
    hidden = getattr(module, "hidden_size", None)
    if not hidden:
        if leaf.startswith(("weight_hh", "weight_ih", "bias")):
            raise ArgumentError(
                f"lstm_default is for recurrent cells and layers; {type(module).__name__} has no hidden_size"
            )
        return 1
    return max(parameter.shape[0] // hidden, 1)


def torch_default(module: Any, generator: Generator | None = None) -> Any:
    """PyTorch's initial distributions for a cell, recurrent layer, Linear or Embedding; returns the module.

    Recurrent: all uniform with bound ``1 / sqrt(hidden_size)``; Linear: with ``1 / sqrt(in_features)``;
    Embedding: standard normal.
    """
    _check_module(module, "torch_default")
    parameters: Iterable[Tensor] = module.parameters()
    if hasattr(module, "num_embeddings"):
        for parameter in parameters:
            normal(parameter, generator=generator)
        return module
    width = getattr(module, "hidden_size", None) or getattr(module, "in_features", None)
    if not width:
        raise ArgumentError(f"torch_default: {type(module).__name__} is no recurrent module, Linear or Embedding")
    bound = 1.0 / math.sqrt(width)
    for parameter in parameters:
        uniform(parameter, -bound, bound, generator)
    return module


if not TYPE_CHECKING:  # a type checker is to find names that do not exist

    def __getattr__(name: str) -> None:
        raise MissingNameError(__name__, name)
