"""Recurrent cells: the equations, in plain ops.  Nobody writes their backward.

A cell is any Module with two methods: ``cell(x, state) -> (output, state)`` for one step, and
``cell.initial_state(batch)``.  :class:`~tinygrad_lstm.nn.Recurrent` runs it over a sequence.  Output and state
may be trees.  The part that depends on x alone is written apart from the part that depends on h: the
compiler moves it out of the time loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.checks import check_dtype, check_int
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.nn import init
from tinygrad_lstm.nn.basic import LayerNorm
from tinygrad_lstm.nn.module import Module, Parameter
from tinygrad_lstm.nn.states import as_part
from tinygrad_lstm.ops.random import check_generator
from tinygrad_lstm.random import Generator
from tinygrad_lstm.tape import name
from tinygrad_lstm.tensor import Tensor, asarray

__all__ = ["GRUCell", "LSTMCell", "LayerNormLSTMCell", "PeepholeLSTMCell", "RNNCell"]


def positive(who: str, **sizes: Any) -> None:
    """Raise unless every size is a positive int."""
    for label, size in sizes.items():
        check_int(f"{who}: {label}", size)


class GatedCell(Module):
    """What the cells share: ``weight_ih (G*H, I)``, ``weight_hh (G*H, R)``, ``bias_ih``, ``bias_hh (G*H,)``.

    G is the number of gates, R the width of the fed-back output (H, or ``proj_size``).
    """

    gates = 1
    noise: Any = None  # nothing is drawn; said here, since to ask a class for what it has not is slow

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, proj_size: int = 0,
        dtype: Any = np.float32, generator: Generator | None = None, **unknown: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if unknown:
            raise DTypeError(
                f"{type(self).__name__} takes no argument {', '.join(sorted(unknown))}; it takes input_size, "
                "hidden_size, bias, proj_size (LSTM), dtype, generator"
            )
        positive(type(self).__name__, input_size=input_size, hidden_size=hidden_size)
        dtype = check_dtype(type(self).__name__, dtype)
        check_generator(type(self).__name__, generator)
        check_int(f"{type(self).__name__}: proj_size", proj_size, None)
        if proj_size and self.gates != 4:
            raise ArgumentError(f"{type(self).__name__}: proj_size={proj_size}, but only LSTM cells have a projection")
        if proj_size and not 0 < proj_size < hidden_size:
            raise ArgumentError(
                f"{type(self).__name__}: proj_size is 0 (no projection) or smaller than hidden_size={hidden_size}, "
                f"found {proj_size}"
            )
        self.input_size, self.hidden_size, self.bias, self.proj_size = input_size, hidden_size, bias, proj_size
        rows = self.gates * hidden_size
        self.weight_ih = Parameter(np.zeros((rows, input_size), dtype))
        self.weight_hh = Parameter(np.zeros((rows, proj_size or hidden_size), dtype))
        if bias:
            self.bias_ih = Parameter(np.zeros(rows, dtype))
            self.bias_hh = Parameter(np.zeros(rows, dtype))
        if proj_size:
            self.weight_hr = Parameter(np.zeros((proj_size, hidden_size), dtype))
        init.lstm_default(self, generator)

    def from_input(self, x: Tensor) -> Tensor:
        """``W_ih x + b_ih``, ``(B, I) -> (B, G*H)``."""
        z = x @ self.weight_ih.T
        return z + self.bias_ih if self.bias else z

    def from_state(self, h: Tensor) -> Tensor:
        """``W_hh h + b_hh``, ``(B, R) -> (B, G*H)``."""
        z = h @ self.weight_hh.T
        return z + self.bias_hh if self.bias else z

    def state_sizes(self) -> tuple[int, ...]:
        """The widths of the parts of the state."""
        return (self.hidden_size,)

    def initial_state(self, batch: int) -> Any:
        """Zeros: ``h (B, H)``."""
        return self._zeros(batch, self.hidden_size)

    def _zeros(self, batch: int, width: int) -> Tensor:
        try:
            return Tensor(np.zeros((batch, width), self.weight_ih.dtype))
        except (TypeError, ValueError):
            check_int(f"{describe(self)}.initial_state: batch", batch, 0)
            raise

    def __call__(self, x: Any, state: Any = None) -> tuple[Any, Any]:
        """One step: ``x (B, I)`` and a state (zeros without it) to ``(output, state)``."""
        x = asarray(x)
        check_input(x, self.input_size, self.weight_ih.dtype, describe(self), "(B, {})")
        return super().__call__(
            x, self.initial_state(x.shape[0]) if state is None else self._checked(state, x.shape[0])
        )

    def _checked(self, state: Any, batch: int) -> Any:
        """A given state with its parts as tensors; one of another shape would broadcast, or be taken apart by rows."""
        sizes, who = self.state_sizes(), describe(self)
        if len(sizes) > 1 and not (isinstance(state, (tuple, list)) and len(state) == len(sizes)):
            found = f"{len(state)} parts" if isinstance(state, (tuple, list)) else f"a {type(state).__name__}"
            raise ShapeError(f"{who}: the state is a pair (h, c), found {found}")
        given = state if len(sizes) > 1 else (state,)
        parts = [as_part(who, f"the state {label}", part) for label, part in zip("hc", given, strict=False)]
        for label, part, size in zip("hc", parts, sizes, strict=False):
            if part.shape != (batch, size):
                raise ShapeError(f"{who}: the state {label} has shape {part.shape}, expected {(batch, size)} (B, H)")
        return tuple(parts) if len(sizes) > 1 else parts[0]

    def extra_repr(self) -> str:
        """The arguments."""
        more = ("" if self.bias else ", bias=False") + (f", proj_size={self.proj_size}" if self.proj_size else "")
        return f"{self.input_size}, {self.hidden_size}{more}"


def describe(module: Module) -> str:
    """For messages: ``LSTM 'encoder'``."""
    return type(module).__name__ + (f" '{module._label}'" if module._label else "")


def check_input(x: Tensor, size: int, dtype: Any, who: str, expected: str) -> None:
    """Raise unless x has the axes, the features in the last one and the dtype that a layer was built for."""
    if x.ndim != expected.count(",") + 1:
        raise ShapeError(f"{who}: x has {x.ndim} axes (x.shape = {x.shape}), expected {expected.format(size)}")
    if x.shape[-1] != size:
        raise ShapeError(
            f"{who}: x has {x.shape[-1]} features in its last axis, the layer was built for input_size={size} "
            f"(x.shape = {x.shape}, expected {expected.format(size)})"
        )
    if x.dtype != dtype:
        raise DTypeError(
            f"{who}: x is {x.dtype}, the parameters are {dtype}; convert x with x.astype(np.{dtype})"
            + (f", or the layer with layer.astype(np.{x.dtype.name})" if x.dtype.kind == "f" else "")
        )


class RNNCell(GatedCell):
    """The simple recurrent cell (Elman 1990): ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``.

    Parameters
    ----------
    input_size, hidden_size : int
    bias : bool
    nonlinearity : "tanh" or "relu"
    dtype : floating dtype of the parameters
    generator : Generator, optional
        What the initial values are drawn from.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> cell = nn.RNNCell(3, 5)
    >>> y, h = cell(np.ones((2, 3), np.float32))
    >>> y.shape
    (2, 5)
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh", *,
        dtype: Any = np.float32, generator: Generator | None = None,
    ) -> None:  # fmt: skip
        if nonlinearity not in ("tanh", "relu"):
            raise ArgumentError(f"{type(self).__name__}: nonlinearity is 'tanh' or 'relu', found {nonlinearity!r}")
        super().__init__(input_size, hidden_size, bias, dtype=dtype, generator=generator)
        self.nonlinearity = nonlinearity

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``x (B, I), h (B, H)`` to ``(h', h')``."""
        activation = ops.tanh if self.nonlinearity == "tanh" else ops.relu
        h = name(activation(self.from_input(x) + self.from_state(h)), "h")
        return h, h


class LSTMCell(GatedCell):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with a forget gate (Gers et al. 2000).

    ::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      f, o alike
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        c' = f * c + i * g
        h' = o * tanh(c')                               W_hr (o * tanh(c')) with proj_size (Sak et al. 2014)

    The rows of the weights are in the order i, f, g, o.  The state is ``(h, c)``.

    Parameters
    ----------
    input_size, hidden_size : int
    bias : bool
    proj_size : int
        Width of h; 0 for hidden_size.
    dtype : floating dtype of the parameters
    generator : Generator, optional
        What the initial values are drawn from.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> cell = nn.LSTMCell(3, 5)
    >>> y, (h, c) = cell(np.ones((2, 3), np.float32), cell.initial_state(2))
    >>> h.shape, c.shape
    ((2, 5), (2, 5))
    """

    gates = 4

    def state_sizes(self) -> tuple[int, ...]:
        """The widths of h and c."""
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """Zeros: ``h (B, R), c (B, H)``."""
        h, c = [self._zeros(batch, size) for size in self.state_sizes()]
        return h, c

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``x (B, I), (h, c)`` to ``(h', (h', c'))``."""
        h, c = state
        i, f, g, o = ops.chunk(self.from_input(x) + self.from_state(h), 4)
        i, f, o = name(ops.sigmoid(i), "i"), name(ops.sigmoid(f), "f"), name(ops.sigmoid(o), "o")
        g = name(ops.tanh(g), "g")
        c = name(f * c + i * g, "c")
        h = o * ops.tanh(c)
        if self.proj_size:
            h = h @ self.weight_hr.T
        return name(h, "h"), (h, c)


class GRUCell(GatedCell):
    """Gated recurrent unit (Cho et al. 2014) in PyTorch's form, the reset gate behind the product.

    ::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z alike
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        h' = (1 - z) * n + z * h

    The rows of the weights are in the order r, z, n.  Parameters as :class:`RNNCell`.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> nn.GRUCell(3, 5)(np.ones((2, 3), np.float32))[0].shape
    (2, 5)
    """

    gates = 3

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``x (B, I), h (B, H)`` to ``(h', h')``."""
        x_r, x_z, x_n = ops.chunk(self.from_input(x), 3)
        h_r, h_z, h_n = ops.chunk(self.from_state(h), 3)
        r, z = name(ops.sigmoid(x_r + h_r), "r"), name(ops.sigmoid(x_z + h_z), "z")
        n = name(ops.tanh(x_n + r * h_n), "n")
        h = name((1.0 - z) * n + z * h, "h")
        return h, h


class PeepholeLSTMCell(LSTMCell):
    """LSTM whose gates see the cell state (Gers, Schraudolph & Schmidhuber 2002).

    ::

        i = sigmoid(z_i + w_ci * c)      f = sigmoid(z_f + w_cf * c)
        c' = f * c + i * tanh(z_g)
        o = sigmoid(z_o + w_co * c')     h' = o * tanh(c')

    with the ``z`` of :class:`LSTMCell` and ``weight_ci, weight_cf, weight_co (H,)``, initially 0.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> nn.PeepholeLSTMCell(3, 5)(np.ones((2, 3), np.float32))[0].shape
    (2, 5)
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, proj_size: int = 0,
        dtype: Any = np.float32, generator: Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, bias, proj_size=proj_size, dtype=dtype, generator=generator)
        self.weight_ci, self.weight_cf, self.weight_co = [Parameter(np.zeros(hidden_size, dtype)) for _ in range(3)]

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``x (B, I), (h, c)`` to ``(h', (h', c'))``."""
        h, c = state
        i, f, g, o = ops.chunk(self.from_input(x) + self.from_state(h), 4)
        i = name(ops.sigmoid(i + self.weight_ci * c), "i")
        f = name(ops.sigmoid(f + self.weight_cf * c), "f")
        g = name(ops.tanh(g), "g")
        c = name(f * c + i * g, "c")
        o = name(ops.sigmoid(o + self.weight_co * c), "o")
        h = o * ops.tanh(c)
        if self.proj_size:
            h = h @ self.weight_hr.T
        return name(h, "h"), (h, c)


class LayerNormLSTMCell(LSTMCell):
    """LSTM with layer normalisation, equations 20 to 22 of Ba, Kiros & Hinton (2016).

    ::

        (i, f, g, o) = LN_x(W_ih x) + LN_h(W_hh h)
        c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h' = sigmoid(o) * tanh(LN_c(c'))

    ``LN_x`` and ``LN_h`` normalise all 4H values of a row together, ``LN_c`` the H of the cell state; their
    shifts take the place of the biases.  Submodules ``norm_x``, ``norm_h``, ``norm_c``; with ``bias=False``
    they have no shifts.  The shift of the forget gate in ``norm_x`` starts at 1.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> nn.LayerNormLSTMCell(3, 5)(np.ones((2, 3), np.float32))[0].shape
    (2, 5)
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, proj_size: int = 0, eps: float = 1e-5,
        dtype: Any = np.float32, generator: Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, False, proj_size=proj_size, dtype=dtype, generator=generator)
        self.norm_x = LayerNorm(4 * hidden_size, eps, bias=bias, dtype=dtype)
        self.norm_h = LayerNorm(4 * hidden_size, eps, bias=bias, dtype=dtype)
        self.norm_c = LayerNorm(hidden_size, eps, bias=bias, dtype=dtype)
        if self.norm_x.bias is not None:
            shift = np.zeros(4 * hidden_size)
            shift[hidden_size : 2 * hidden_size] = 1.0
            init.copy(self.norm_x.bias, shift)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``x (B, I), (h, c)`` to ``(h', (h', c'))``."""
        h, c = state
        i, f, g, o = ops.chunk(self.norm_x(self.from_input(x)) + self.norm_h(self.from_state(h)), 4)
        i, f, o = name(ops.sigmoid(i), "i"), name(ops.sigmoid(f), "f"), name(ops.sigmoid(o), "o")
        g = name(ops.tanh(g), "g")
        c = name(f * c + i * g, "c")
        h = o * ops.tanh(self.norm_c(c))
        if self.proj_size:
            h = h @ self.weight_hr.T
        return name(h, "h"), (h, c)
