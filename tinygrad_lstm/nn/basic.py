"""Layers that are not recurrent: Linear, Embedding, LayerNorm, Dropout, Sequential."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.checks import check_dtype, check_int, check_probability
from tinygrad_lstm.errors import ArgumentError, DTypeError, OutOfRangeError, ShapeError
from tinygrad_lstm.kernels import expression as e
from tinygrad_lstm.nn import init
from tinygrad_lstm.nn.module import Module, Parameter
from tinygrad_lstm.ops.random import check_generator
from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.random import Generator
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.trace import TracedTensor

__all__ = ["Dropout", "Embedding", "LayerNorm", "Linear", "Sequential"]


class Linear(Module):
    """``y = x W^T + b``, ``(..., in_features) -> (..., out_features)``.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    dtype : floating dtype of ``weight (out, in)`` and ``bias (out,)``
    generator : Generator, optional
        Initial values as in PyTorch: uniform with bound ``1 / sqrt(in_features)``.

    Raises
    ------
    ShapeError, DTypeError
        x of another width or another floating dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> nn.Linear(3, 4)(np.ones((7, 2, 3), np.float32)).shape
    (7, 2, 4)
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, dtype: Any = np.float32,
        generator: Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dtype = check_dtype("Linear", dtype)
        check_generator("Linear", generator)
        check_int("Linear: in_features", in_features)
        check_int("Linear: out_features", out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(np.zeros((out_features, in_features), dtype))
        self.bias = Parameter(np.zeros(out_features, dtype)) if bias else None
        init.torch_default(self, generator)

    def forward(self, x: Any) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        x = asarray(x)
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ShapeError(
                f"Linear{self._said()}: x has shape {x.shape}, the layer was built for "
                f"in_features={self.in_features} in its last axis"
            )
        if x.dtype != self.weight.dtype:
            raise DTypeError(
                f"Linear{self._said()}: x is {x.dtype}, the weight is {self.weight.dtype}; convert one with astype"
            )
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def _said(self) -> str:
        return f" '{self._label}'" if self._label else ""

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.in_features}, {self.out_features}{'' if self.bias is not None else ', bias=False'}"


def _checked_ids(ids: np.ndarray, *, rows: int) -> np.ndarray:
    if ids.size and (ids.min() < 0 or ids.max() >= rows):
        bad = ids[(ids < 0) | (ids >= rows)].reshape(-1)[0]
        raise OutOfRangeError(f"Embedding: id {bad} is outside of 0..{rows - 1} (num_embeddings={rows})")
    return ids


_ids_in_range: Primitive = Primitive(
    "embedding_ids", _checked_ids, None, shape=lambda ids, rows: ids, differentiable=False, register=False,
    doc="Ids as they are; raises OutOfRangeError for one outside of 0 .. rows - 1.",
)  # fmt: skip
# The same in the body of a loop, where it has to be native.  ``take`` counts negative indices from the end, as NumPy
# does; before it they become too large, so that native code ends the loop, and NumPy, which runs it again, raises (or
# ``take`` does, where this was fused with something else).
_ids_in_loop: Primitive = Primitive(
    "embedding_ids_in_loop", _checked_ids, None, expression=lambda ids, *, rows: e.where(ids < 0, rows, ids),
    is_elementwise=True, differentiable=False, register=False,
)  # fmt: skip
_ids_in_range.only_checks = _ids_in_loop.only_checks = True


class Embedding(Module):
    """A table of vectors: integer ids ``(...)`` to ``(..., embedding_dim)``.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        ``weight (num_embeddings, embedding_dim)``, initially standard normal, as in PyTorch.
    padding_idx : int, optional
        This row is zero at the start and gets no gradient.
    dtype : floating dtype of the weight
    generator : Generator, optional

    Raises
    ------
    OutOfRangeError
        An id outside of ``0 .. num_embeddings - 1``.
    DTypeError
        Ids that are no integers.

    Examples
    --------
    >>> from tinygrad_lstm import nn
    >>> nn.Embedding(10, 4)([[1, 2, 9]]).shape
    (1, 3, 4)
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, dtype: Any = np.float32,
        generator: Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dtype = check_dtype("Embedding", dtype)
        check_generator("Embedding", generator)
        check_int("Embedding: num_embeddings", num_embeddings)
        check_int("Embedding: embedding_dim", embedding_dim)
        if padding_idx is not None:
            check_int("Embedding: padding_idx", padding_idx, least=None)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise OutOfRangeError(f"Embedding: padding_idx {padding_idx} is outside of {num_embeddings} rows")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.weight = Parameter(np.zeros((num_embeddings, embedding_dim), dtype))
        init.torch_default(self, generator)
        if self.padding_idx is not None:
            self.weight._data[self.padding_idx] = 0

    def forward(self, ids: Any) -> Tensor:
        """Integer ids ``(...)`` to ``(..., embedding_dim)``."""
        ids = asarray(ids)
        if ids.dtype.kind not in "iu":
            raise DTypeError(f"Embedding: ids are integers, found dtype {ids.dtype}; convert with astype(np.int64)")
        if not isinstance(ids, TracedTensor):
            _checked_ids(ids._data, rows=self.num_embeddings)
        else:
            check = _ids_in_range if ids._trace.runs else _ids_in_loop
            ids = check(ids.astype(np.int64), rows=self.num_embeddings)
        out = ops.take(self.weight, ids, axis=0)
        if self.padding_idx is not None:
            # Selected, not multiplied: the padding row keeps its value and gets no gradient.
            padded = ops.expand_dims(ops.equal(ids, self.padding_idx), -1)
            out = ops.where(padded, ops.stop_gradient(out), out)
        return out

    def extra_repr(self) -> str:
        """The arguments."""
        more = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{more}"


class LayerNorm(Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axes (Ba, Kiros & Hinton 2016).

    Parameters
    ----------
    normalized_shape : int or tuple of ints
        The lengths of the last axes, which are normalised together.
    eps : float
    elementwise_affine : bool
        Whether there are ``weight`` (initially 1) and ``bias`` (0) of that shape.
    bias : bool
    dtype : floating dtype of the parameters

    Examples
    --------
    >>> from tinygrad_lstm import nn
    >>> [round(v, 3) for v in nn.LayerNorm(2)([[1.0, 3.0]])[0].tolist()]
    [-1.0, 1.0]
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True,
        bias: bool = True, *, dtype: Any = np.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        dtype = check_dtype("LayerNorm", dtype)
        shape = tuple(normalized_shape) if isinstance(normalized_shape, (Sequence, np.ndarray)) else (normalized_shape,)
        for length in shape:
            check_int("LayerNorm: every length of normalized_shape", length)
        if not shape:
            raise ArgumentError("LayerNorm: normalized_shape has no axes, expected at least one")
        self.normalized_shape, self.eps = shape, eps
        self.weight = Parameter(np.ones(shape, dtype)) if elementwise_affine else None
        self.bias = Parameter(np.zeros(shape, dtype)) if elementwise_affine and bias else None

    def forward(self, x: Any) -> Tensor:
        """Same shape."""
        x = asarray(x)
        if x.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            raise ShapeError(
                f"LayerNorm{f' {self._label!r}' if self._label else ''}: x has shape {x.shape}, "
                f"its last axes must be {self.normalized_shape}"
            )
        axes = tuple(range(-len(self.normalized_shape), 0))
        centred: Any = x - ops.mean(x, axes, keepdims=True)
        variance = ops.mean(ops.square(centred), axes, keepdims=True)
        y = centred * (1.0 / ops.sqrt(variance + self.eps))  # one division a row instead of one an element
        if self.weight is not None:
            y = y * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """The arguments."""
        shape = self.normalized_shape
        return f"{shape[0] if len(shape) == 1 else shape}, eps={self.eps}"


class Dropout(Module):
    """In training, zero each element with probability p and divide the others by 1 - p (Srivastava et al. 2014).

    Parameters
    ----------
    p : float in [0, 1]
    generator : Generator, optional
        The default one (``tg.seed``) without it.

    Examples
    --------
    >>> from tinygrad_lstm import nn
    >>> nn.Dropout(0.5).eval()([1.0, 2.0]).tolist()
    [1.0, 2.0]
    """

    def __init__(self, p: float = 0.5, generator: Generator | None = None) -> None:
        super().__init__()
        self.p, self.generator = check_probability("Dropout", p), check_generator("Dropout", generator)

    def forward(self, x: Any) -> Tensor:
        """Same shape; x itself in evaluation."""
        return ops.dropout(x, self.p, self.generator, self.training)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"p={self.p}"


class Sequential(Module):
    """Modules (or functions) one after the other: ``Sequential(a, b)(x)`` is ``b(a(x))``.

    A recurrent layer in it hands on its output and drops its state.  Names are "0", "1", ..., as in PyTorch, or the
    keys of a dict: ``Sequential(OrderedDict(encoder=a, head=b))``.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn, ops
    >>> model = nn.Sequential(nn.Linear(3, 4), ops.tanh, nn.Linear(4, 1))
    >>> model(np.ones((2, 3), np.float32)).shape
    (2, 1)
    >>> list(model.state_dict())
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    _named: tuple[str, ...] = ()  # the names that are no numbers

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        given = parts[0].items() if len(parts) == 1 and isinstance(parts[0], Mapping) else enumerate(parts)
        for name, part in given:
            self._add(str(name), part)

    def _add(self, name: str, part: Any) -> None:
        if not callable(part) or isinstance(part, type):
            found = f"the class {part.__name__}" if isinstance(part, type) else f"a {type(part).__name__}"
            more = "; make one: " + part.__name__ + "(...)" if isinstance(part, type) else ""
            if isinstance(part, (list, tuple)):
                more = "; write Sequential(*parts)"
            raise DTypeError(f"Sequential: part {name} is {found}, expected a Module or a function{more}")
        if not name.isdigit():
            if not name or hasattr(self, name):
                raise ArgumentError(f"Sequential: {name!r} is no name for a part: it is empty, taken or a method's")
            self._named = (*self._named, name)
        setattr(self, name, part)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts().values())

    def _parts(self) -> dict[str, Any]:
        return {name: part for name, part in self.__dict__.items() if name.isdigit() or name in self._named}

    def __len__(self) -> int:
        return len(self._parts())

    def __getitem__(self, index: int | slice) -> Any:
        """A part; of a slice, a Sequential of the parts under their names."""
        if isinstance(index, slice):
            return Sequential(dict(list(self._parts().items())[index]))
        check_int("Sequential: an index", index, None)
        if not -len(self) <= index < len(self):
            raise OutOfRangeError(f"Sequential: part {index} of {len(self)}")
        return list(self)[index]

    def append(self, part: Any) -> Sequential:
        """Add a part at the end."""
        self._add(str(next(n for n in itertools.count(len(self)) if not hasattr(self, str(n)))), part)
        return self

    def forward(self, x: Any) -> Any:
        """Through all parts."""
        for part in self:
            x = part(x)
            if isinstance(x, tuple) and getattr(part, "returns_state", False):
                x = x[0]
        return x
