"""nn.RNN, nn.LSTM, nn.GRU: stacked recurrent layers with PyTorch's arguments, shapes and parameter names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.checks import check_dtype
from tinygrad_lstm.compiler.schedule import check_memory
from tinygrad_lstm.errors import DTypeError, ShapeError
from tinygrad_lstm.hints import missing_attribute
from tinygrad_lstm.nn.budget import Budgeted
from tinygrad_lstm.nn.cells import GatedCell, GRUCell, LSTMCell, RNNCell, check_input, describe, positive
from tinygrad_lstm.nn.module import Module, Parameter, Place
from tinygrad_lstm.nn.ready import find, keep
from tinygrad_lstm.nn.recurrent import check_between, joined, run_cell
from tinygrad_lstm.nn.states import as_part
from tinygrad_lstm.ops.lengths import check_lengths
from tinygrad_lstm.ops.random import check_generator
from tinygrad_lstm.primitive import REGISTRY
from tinygrad_lstm.random import Generator
from tinygrad_lstm.tape import _STATE
from tinygrad_lstm.tensor import Tensor, asarray

__all__ = ["GRU", "LSTM", "RNN"]


_reshape = REGISTRY["reshape"]
_DEFAULTS = {
    "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False, "proj_size": 0,
    "memory": None,
}  # fmt: skip


class RecurrentLayers(Budgeted):
    """What RNN, LSTM and GRU share.

    The cells hold the parameters and the equations; the layer shows the parameters under PyTorch's flat
    names (``weight_ih_l0``, ``weight_hh_l0_reverse``, ...), as attributes and in ``state_dict``.
    """

    returns_state = True
    state_parts = 1
    cell_options: tuple[str, ...] = ()  # what the cell takes beyond what every layer does

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, *, return_states: bool = False, return_gates: bool = False,
        dtype: Any = np.float32, generator: Generator | None = None, memory: int | float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        who = type(self).__name__
        dtype = check_dtype(who, dtype)
        positive(who, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_between(who, dropout, num_layers)
        self.input_size, self.hidden_size, self.num_layers = int(input_size), int(hidden_size), int(num_layers)
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        self.return_states, self.return_gates = return_states, return_gates
        self.generator, self.memory = check_generator(who, generator), check_memory(memory, who)
        if not set(options) <= set(self.cell_options):
            unknown = ", ".join(sorted(set(options) - set(self.cell_options)))
            raise DTypeError(f"{who} takes no argument {unknown}; it takes {', '.join(_arguments(self))}")
        self.proj_size = options.get("proj_size", 0)
        width = (self.proj_size or hidden_size) * self.directions
        self._cells = [
            self.make_cell(
                width if layer else input_size, hidden_size, bias, dtype=dtype, generator=generator, **options
            )
            for layer in range(num_layers)
            for _ in range(self.directions)
        ]
        self._suffixes = [f"l{k}{end}" for k in range(num_layers) for end in ("", "_reverse")[: self.directions]]
        for cell, suffix in zip(self._cells, self._suffixes, strict=True):
            cell.__dict__["_label"] = suffix

    @staticmethod
    def make_cell(input_size: int, hidden_size: int, bias: bool, **options: Any) -> GatedCell:
        """The cell of one layer and direction."""
        raise NotImplementedError

    @property
    def directions(self) -> int:
        """1, or 2 for a bidirectional layer."""
        return 2 if self.bidirectional else 1

    # ------------------------------------------------------------------ PyTorch's flat names

    def _places(self) -> Iterator[Place]:
        for cell, suffix in zip(self._cells, self._suffixes, strict=True):
            for place in cell._places():
                yield Place(f"{place.name}_{suffix}", place.holder, place.key)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """None: the cells are shown as this layer's own parameters."""
        return iter(())

    def _place(self, name: str) -> Place | None:
        if "_cells" not in self.__dict__ or "_suffixes" not in self.__dict__:
            return None
        return next((place for place in self._places() if place.name == name), None)

    def __getattr__(self, name: str) -> Any:
        place = None if name.startswith("_") else self._place(name)
        if place is None:
            made = not name.startswith("_") and "_suffixes" in self.__dict__
            raise missing_attribute(self, name, {**self.__dict__, **self.__tree_leaves__()} if made else None)
        return place.value

    def __setattr__(self, name: str, value: Any) -> None:
        place = self._place(name) if name.startswith(("weight_", "bias_")) else None
        if place is None:
            super().__setattr__(name, value)
            return
        if not isinstance(value, Parameter) or value.shape != place.value.shape:
            shown = f"shape {value.shape}" if isinstance(value, Parameter) else type(value).__name__
            raise ShapeError(f"{describe(self)}.{name} is a Parameter of shape {place.value.shape}, found {shown}")
        cell = next(cell for cell in self._cells if cell.__dict__ is place.holder)
        setattr(cell, place.key, value)

    # ------------------------------------------------------------------ running

    def forward(
        self, x: Any, state: Any = None, lengths: Any = None, *, return_states: bool | None = None,
        return_gates: bool | None = None, memory: int | float | None = None,
    ) -> Any:  # fmt: skip
        """Outputs of the last layer at all steps, and the final state of every layer and direction.

        Parameters
        ----------
        x : ``(T, B, input_size)``, ``(B, T, input_size)`` with batch_first, or ``(T, input_size)``
            In the dtype of the parameters.
        state : optional
            Shape ``(num_layers * directions, B, H)``, for an LSTM a pair (h, c) of them; no axis B for unbatched
            x; zeros without it.
        lengths : B ints in 0..T, optional
            Outputs past a sequence's length are zero, its final state is that of its last valid step (the given
            state for length 0); what the padding holds changes nothing.
        return_states, return_gates : bool, optional
            Add a third result: a dict name -> ``(num_layers * directions, T, B, H)``, time-major, with every state
            ("h", "c") and with ``return_gates`` every gate too ("i", "f", "g", "o"; "r", "z", "n").
        memory : int or float, optional
            In place of the layer's own.

        Returns
        -------
        output : ``(T, B, directions * H)``
        state : as the argument
        trajectories : dict, if asked for

        Raises
        ------
        ShapeError, DTypeError
            With the shapes or dtypes found and expected.
        """
        plain = lengths is None and not return_states and not return_gates and memory is None
        if x.__class__ is np.ndarray:
            x = asarray(x)
        if plain and x.__class__ is Tensor:
            ready, current = find(self, x), _STATE.get()
            if ready is not None and current.plain:
                timed = ops.swapaxes(x, 0, 1) if self.batch_first else x
                result = ready.whole(timed, self._cells, current, state)
                if result is not None:
                    return result if not self.batch_first else (ops.swapaxes(result[0], 0, 1), result[1])
        who = describe(self)
        want_states = self.return_states if return_states is None else return_states
        want_gates = self.return_gates if return_gates is None else return_gates
        if x is None:
            raise DTypeError(f"{who}: x is None, expected an array")
        given = x = asarray(x)
        unbatched = x.ndim == 2
        expected = "(T, {})" if unbatched else "(B, T, {})" if self.batch_first else "(T, B, {})"
        check_input(x, self.input_size, self._cells[0].weight_ih.dtype, who, expected)
        if unbatched:
            x = ops.expand_dims(x, 1)
        elif self.batch_first:
            x = ops.swapaxes(x, 0, 1)
        timed, (steps, batch) = x, x.shape[:2]
        if unbatched and lengths is not None and np.ndim(lengths) == 0:
            lengths = np.reshape(lengths, 1)
        if lengths is not None:
            lengths = check_lengths(lengths, steps, batch, who)
        starts = self._split_state(state, batch, unbatched, who)
        share = None if memory is None and self.memory is None else self.budget(memory, len(self._cells))
        finals, trajectories = [], []
        for layer in range(self.num_layers):
            if layer:
                x = ops.dropout(x, self.dropout, self.generator, self.training)
            outputs = []
            for k in range(layer * self.directions, (layer + 1) * self.directions):
                y, final, trajectory = run_cell(
                    self._cells[k], x, starts[k], lengths=lengths, reverse=k % self.directions == 1,
                    states=want_states, gates=want_gates, memory=share,
                )  # fmt: skip
                outputs.append(y)
                finals.append(final)
                trajectories.append({name: ops.expand_dims(value, 0) for name, value in trajectory.items()})
            x = outputs[0] if len(outputs) == 1 else ops.concatenate(outputs, axis=-1)
        if unbatched:
            x = ops.squeeze(x, 1)
        elif self.batch_first:
            x = ops.swapaxes(x, 0, 1)
        result = (x, self._join_state(finals, unbatched))
        if not (want_states or want_gates):
            draws = self.dropout and self.training and self.num_layers > 1
            common = plain and share is None and not unbatched and steps
            common = common and not (self.return_states or self.return_gates)  # what the next call gives by default
            if common and not draws and _STATE.get().plain:
                keep(self, self._cells, self.directions, self.state_parts, timed, given)
            return result
        joint = joined(trajectories)
        return (*result, {name: ops.squeeze(value, 2) for name, value in joint.items()} if unbatched else joint)

    def _split_state(self, state: Any, batch: int, unbatched: bool, who: str) -> list[Any]:
        """The state of every cell from one in PyTorch's form."""
        if state is None:
            return [cell.initial_state(batch) for cell in self._cells]
        parts = (state,) if self.state_parts == 1 else state
        if not isinstance(parts, (tuple, list)) or len(parts) != self.state_parts:
            raise ShapeError(f"{who}: the state is a pair (h, c), found {type(state).__name__}")
        count, dtype = len(self._cells), self._cells[0].weight_ih.dtype
        tensors = []
        for label, part, size in zip("hc", parts, self._cells[0].state_sizes(), strict=False):
            t = as_part(who, f"initial {label}", part)
            expected = (count, size) if unbatched else (count, batch, size)
            if t.shape != expected:
                axes = "(num_layers * directions, H)" if unbatched else "(num_layers * directions, B, H)"
                raise ShapeError(f"{who}: initial {label} has shape {t.shape}, expected {expected} {axes}")
            if t.dtype != dtype:
                raise DTypeError(
                    f"{who}: initial {label} is {t.dtype}, the parameters are {dtype}; convert one of them with astype"
                )
            tensors.append(ops.expand_dims(t, 1) if unbatched else t)
        if self.state_parts == 1:
            return [tensors[0][k] for k in range(count)]
        return [tuple(t[k] for t in tensors) for k in range(count)]

    def _join_state(self, finals: list[Any], unbatched: bool) -> Any:
        """The state in PyTorch's form from that of every cell."""

        def stacked(parts: list[Tensor]) -> Tensor:
            whole = ops.stack(parts) if len(parts) > 1 else _reshape(parts[0], shape=(1, *parts[0].shape))
            return ops.squeeze(whole, 1) if unbatched else whole

        if self.state_parts == 1:
            return stacked(finals)
        return tuple(stacked([final[k] for final in finals]) for k in range(self.state_parts))

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        shown = [f"{self.input_size}, {self.hidden_size}"]
        shown += [f"{key}={getattr(self, key)}" for key, default in _DEFAULTS.items() if getattr(self, key) != default]
        return ", ".join(shown)


def _arguments(layer: RecurrentLayers) -> list[str]:
    """The names of the arguments of a layer's class."""
    names = [*inspect.signature(type(layer)).parameters, *inspect.signature(RecurrentLayers).parameters]
    return [name for name in dict.fromkeys(names) if name != "options"]


class RNN(RecurrentLayers):
    """Simple recurrent layers (Elman 1990), see :class:`~tinygrad_lstm.nn.RNNCell`.

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
    nonlinearity : "tanh" or "relu"
    bias, batch_first, bidirectional : bool
    dropout : float
        On the outputs between layers, in training.
    return_states, return_gates : bool
        See :meth:`forward`.
    memory : int or float, optional
        The most that is kept for the backward pass, in bytes or as a fraction of everything, see
        :func:`~tinygrad_lstm.ops.scan`; bytes are shared out evenly among layers and directions.  An attribute.
    dtype : floating dtype of the parameters
    generator : Generator, optional
        For initial values and dropout.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> output, h = nn.RNN(3, 5, num_layers=2)(np.ones((7, 2, 3), np.float32))
    >>> output.shape, h.shape
    ((7, 2, 5), (2, 2, 5))
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            nonlinearity=nonlinearity, **options,
        )  # fmt: skip
        self.nonlinearity = nonlinearity

    cell_options = ("nonlinearity",)

    @staticmethod
    def make_cell(input_size: int, hidden_size: int, bias: bool, **options: Any) -> GatedCell:
        """An RNNCell."""
        return RNNCell(input_size, hidden_size, bias, **options)


class LSTM(RecurrentLayers):
    """Long short-term memory layers (Hochreiter & Schmidhuber 1997), see :class:`~tinygrad_lstm.nn.LSTMCell`.

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
    bias, batch_first, bidirectional : bool
    dropout : float
        On the outputs between layers, in training.
    proj_size : int
        Width of h (Sak et al. 2014); 0 for hidden_size.
    return_states, return_gates : bool
        See :meth:`forward`.
    memory : int or float, optional
        The most that is kept for the backward pass, in bytes or as a fraction of everything, see
        :func:`~tinygrad_lstm.ops.scan`; bytes are shared out evenly among layers and directions.  An attribute.
    dtype : floating dtype of the parameters
    generator : Generator, optional
        For initial values and dropout.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> layer = nn.LSTM(3, 5, bidirectional=True)
    >>> output, (h, c) = layer(np.ones((7, 2, 3), np.float32), lengths=[7, 4])
    >>> output.shape, h.shape
    ((7, 2, 10), (2, 2, 5))
    """

    state_parts = 2
    cell_options = ("proj_size",)

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size=proj_size, **options,
        )  # fmt: skip

    @staticmethod
    def make_cell(input_size: int, hidden_size: int, bias: bool, **options: Any) -> GatedCell:
        """An LSTMCell."""
        return LSTMCell(input_size, hidden_size, bias, **options)


class GRU(RecurrentLayers):
    """Gated recurrent unit layers (Cho et al. 2014), see :class:`~tinygrad_lstm.nn.GRUCell`.

    Parameters as :class:`RNN`, without ``nonlinearity``.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> output, h = nn.GRU(3, 5, batch_first=True)(np.ones((2, 7, 3), np.float32))
    >>> output.shape, h.shape
    ((2, 7, 5), (1, 2, 5))
    """

    @staticmethod
    def make_cell(input_size: int, hidden_size: int, bias: bool, **options: Any) -> GatedCell:
        """A GRUCell."""
        return GRUCell(input_size, hidden_size, bias, **options)
