"""The one driver of recurrent cells, and what is built of it: Recurrent, Bidirectional, Stack.

Everything that touches ``ops.scan`` is in :func:`run_cell`.  There is no backward here: scan differentiates
the cell's ops.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.calls import misfit
from tinygrad_lstm.checks import check_probability
from tinygrad_lstm.compiler.blame import users_level
from tinygrad_lstm.compiler.schedule import Memory, check_memory
from tinygrad_lstm.errors import ArgumentError, DTypeError, Error, ShapeError
from tinygrad_lstm.nn.budget import Budgeted
from tinygrad_lstm.nn.cells import GatedCell, check_input, describe
from tinygrad_lstm.nn.module import Parameter
from tinygrad_lstm.nn.programs import recorder_for
from tinygrad_lstm.nn.ready import find, keep_recurrent
from tinygrad_lstm.nn.states import checked_state
from tinygrad_lstm.ops.control import scan_with
from tinygrad_lstm.ops.lengths import check_lengths
from tinygrad_lstm.record import part_name
from tinygrad_lstm.tape import recording
from tinygrad_lstm.tape import state as recording_state
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.tree import describe as describe_tree
from tinygrad_lstm.tree import flatten, tree_map, unflatten

__all__ = ["Bidirectional", "Recurrent", "Stack", "run_cell"]

Trajectories = dict[str, Tensor]


def run_cell(
    cell: Any, x: Any, init: Any, *, lengths: Any = None, reverse: bool = False, states: bool = False,
    gates: bool = False, noise: Any = None, memory: Memory = None,
) -> tuple[Any, Any, Trajectories]:  # fmt: skip
    """Run a cell over a sequence: ``(outputs, final state, trajectories)``, all of them time-major.

    ``x`` is a tree of ``(T, B, ...)``, ``init`` a state.  With ``states`` the trajectories hold every part of the
    state at every step, with ``gates`` also every other value that the cell names with ``tg.name``; each
    is ``(T, B, ...)``.  ``noise``: a tree of ``(T, ...)`` handed to the cell as third argument.  ``memory``: as in
    :func:`~tinygrad_lstm.ops.scan`.
    """

    def body(carry: Any, xs: Any) -> Any:
        inputs = (xs, carry) if noise is None else (xs[0], carry, xs[1])
        if not (states or gates):
            out, new = _stepped(cell, *inputs)
            return new, out
        with recording(names={}):
            out, new = _stepped(cell, *inputs)
            named = recording_state().names or {}
        return new, (out, _selected(named, new, gates))

    xs = x if noise is None else (x, noise)
    variant = (lengths is not None, states, gates)
    final, ys = scan_with(recorder_for(cell, variant), body, init, xs, lengths=lengths, reverse=reverse, memory=memory)
    return (*((ys, final) if not (states or gates) else (ys[0], final)), ys[1] if states or gates else {})


def check_pair(who: str, result: Any) -> None:
    """Raise unless a cell returned an output and a state."""
    if not isinstance(result, tuple) or len(result) != 2:
        found = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise DTypeError(
            f"{who}.forward returned {'Tensor' if isinstance(result, Tensor) else found}, expected a pair "
            "(output, state); "
            "a cell whose output is its state returns (h, h)"
        )


def _stepped(cell: Any, x: Any, carry: Any, *noise: Any) -> tuple[Any, Any]:
    """One step of the cell; errors in terms of a cell, not of a scan."""
    who = type(cell).__name__
    _check_state_dtype(x, carry, who)
    try:
        result = cell(x, carry, *noise)
    except (Error, AttributeError, TypeError) as error:
        if flatten(carry)[0]:
            raise
        raise DTypeError(
            f"{who}.initial_state returned {carry!r}, a state without any array, with which {who}.forward failed: "
            f"{error}; return an array (B, ...), or a tree of them"
        ) from error
    check_pair(who, result)
    old, old_tree = flatten(carry)
    new, new_tree = flatten(result[1])
    if new_tree != old_tree:
        raise ShapeError(
            f"{who}.forward returned a state {describe_tree(new_tree)}, initial_state gives {describe_tree(old_tree)}"
        )
    for k, (n, o) in enumerate(zip(map(asarray, new), old, strict=True)):
        part = f"part {k} of the state" if len(old) > 1 else "the state"
        kind = ShapeError if n.shape != o.shape else DTypeError
        if n.shape != o.shape or n.dtype != o.dtype:
            raise kind(
                f"{who}: {part} went in as {o.dtype}{list(o.shape)} and came back as {n.dtype}{list(n.shape)}; "
                f"make initial_state and forward of {who} agree"
            )
    return result


def _check_state_dtype(x: Any, carry: Any, who: str) -> None:
    """Raise where all of the state has another floating dtype than x: the whole loop would silently run in that one.

    A state of several dtypes is meant so.
    """
    of_x = {leaf.dtype for leaf in flatten(x)[0] if leaf.dtype.kind == "f"}
    of_state = {leaf.dtype for leaf in map(asarray, flatten(carry)[0]) if leaf.dtype.kind == "f"}
    if len(of_x) == len(of_state) == 1 and of_x != of_state:
        (expected,), (found,) = of_x, of_state
        raise DTypeError(
            f"{who}: x is {expected}, the state that it starts from is {found}; give initial_state (or the state of "
            f"the call) dtype=np.{expected}, or convert x with astype(np.{found})"
        )


def _selected(named: dict[str, Tensor], carry: Any, gates: bool) -> Trajectories:
    """The parts of the new state under the names that the cell gave them, then the other named values."""
    labels = {id(value): label for label, value in named.items()}
    leaves = flatten(carry)[0]
    chosen = {}
    for k, leaf in enumerate(leaves):
        chosen[labels.get(id(leaf), part_name(k, len(leaves)))] = leaf
    if gates:
        chosen.update({label: value for label, value in named.items() if label not in chosen})
    return chosen


def flipped(tree: Any) -> Any:
    """Time-major from batch-major and back: the first two axes of every leaf swapped."""
    return tree_map(lambda leaf: ops.swapaxes(leaf, 0, 1), tree)


def _is_of_tensors(state: Any) -> bool:
    """Whether a state is a tensor, or a tuple of them."""
    if state.__class__ is tuple:
        return all(part.__class__ is Tensor for part in state)
    return state.__class__ is Tensor


def check_cell(cell: Any, who: str) -> None:
    """Raise unless the object has a cell's two methods."""
    if isinstance(cell, type) or not callable(cell) or not hasattr(cell, "initial_state"):
        found = f"the class {cell.__name__}" if isinstance(cell, type) else f"a {type(cell).__name__}"
        instead = ""
        if isinstance(cell, type) and hasattr(cell, "initial_state"):
            instead = f"; make one: {cell.__name__}(input_size, hidden_size)"
        elif isinstance(cell, Budgeted):
            instead = "; it is a layer, which is called on a sequence as it is"
        raise DTypeError(
            f"{who}: {found} is no cell{instead}; a cell is a Module with forward(x, state) -> (output, state) "
            "and initial_state(batch)"
        )


class Recurrent(Budgeted):
    """Run a cell over a sequence.

    The cell's forward is recorded once for each signature, and what was recorded runs at every step.  Parameters,
    attributes, globals and class attributes are looked at again at every call; what a function returns anew
    each time (``numpy.random``, a clock) is not: draw such numbers in ``noise``, or pass them as inputs.

    Parameters
    ----------
    cell : Module
        With ``cell(x, state) -> (output, state)`` and ``cell.initial_state(batch)``; output and state may be trees.
        If it has ``noise(steps, batch)``, what that returns (a tree of ``(T, ...)``) is drawn before the loop, and
        the cell is called with one step of it as third argument.
    reverse : bool
        Run from the last (valid) step to the first; outputs stay at their positions.
    batch_first : bool
        x and the outputs are ``(B, T, ...)`` instead of ``(T, B, ...)``.
    learn_state : bool
        Train the initial state: one Parameter ``learned_state.k (1, ...)`` per floating part, the same for every
        sequence.
    return_states, return_gates : bool
        Return a third result, see :meth:`forward`.
    memory : int or float, optional
        The most that is kept for the backward pass, see :func:`~tinygrad_lstm.ops.scan`; an attribute that may be
        changed between calls.  :meth:`memory_plan` says what it costs.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> layer = nn.Recurrent(nn.PeepholeLSTMCell(3, 5))
    >>> outputs, (h, c) = layer(np.ones((7, 2, 3), np.float32), lengths=[7, 4])
    >>> outputs.shape, h.shape
    ((7, 2, 5), (2, 5))
    """

    returns_state = True

    def __init__(
        self, cell: Any, reverse: bool = False, batch_first: bool = False, *, learn_state: bool = False,
        return_states: bool = False, return_gates: bool = False, memory: int | float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_cell(cell, "Recurrent")
        self.cell, self.reverse, self.batch_first = cell, reverse, batch_first
        self.return_states, self.return_gates = return_states, return_gates
        self.memory = check_memory(memory, "Recurrent")
        self.learned_state = None
        if learn_state:
            parts = map(asarray, flatten(_first_state(cell, 1))[0])
            self.learned_state = [Parameter(part._data[:1]) for part in parts if part.dtype.kind == "f"]

    def start(self, batch: int, given: Any = None) -> Any:
        """The state to start from: the given one, the learned one, or the cell's."""
        default = _first_state(self.cell, batch)
        leaves, treedef = flatten(default)
        if given is not None:
            return checked_state(describe(self), type(self.cell).__name__, given, leaves, treedef)
        if self.learned_state is not None:
            grown = iter([ops.broadcast_to(p, (batch, *p.shape[1:])) for p in self.learned_state])
            return unflatten(treedef, [next(grown) if asarray(leaf).dtype.kind == "f" else leaf for leaf in leaves])
        return default

    def forward(
        self, x: Any, state: Any = None, lengths: Any = None, *, return_states: bool | None = None,
        return_gates: bool | None = None, memory: int | float | None = None,
    ) -> Any:  # fmt: skip
        """Outputs of all steps and the final state.

        Parameters
        ----------
        x : ``(T, B, ...)``, or a tree of such (``(B, T, ...)`` with batch_first)
            With two axes, one number or id per row and step.  One sequence ``(T, features)`` is ``x[:, None]``; which
            of both a cell of one's own means, nothing tells.
        state : tree of ``(B, ...)``, optional
        lengths : B ints in 0..T, optional
            Outputs past a sequence's length are zero, its final state is that of its last valid step; what the
            padding holds changes nothing.
        return_states, return_gates : bool, optional
            Add a third result: a dict of ``(1, T, B, ...)`` with every part of the state, and with
            ``return_gates`` every value that the cell names with ``tg.name`` as well.
        memory : int or float, optional
            In place of the layer's own.

        Returns
        -------
        (outputs, final state), or (outputs, final state, trajectories)
        """
        if x.__class__ is np.ndarray:
            x = asarray(x)
        plain = x.__class__ is Tensor and lengths is None and memory is None
        start = None
        if plain and not return_states and not return_gates and (state is None or _is_of_tensors(state)):
            ready, current = find(self, x), recording_state()
            if ready is not None and (captures := ready.captures((self.cell,), current)) is not None:
                timed: Any = flipped(x) if self.batch_first else x
                if state is None:
                    start = ready.start(timed._data.shape[1])
                result = ready(timed, start if state is None else state, captures, current)
                if result is not None:
                    return (flipped(result[0]), result[1]) if self.batch_first else result
        who = describe(self)
        want_states = self.return_states if return_states is None else return_states
        want_gates = self.return_gates if return_gates is None else return_gates
        given, x = x, tree_map(asarray, x)
        leaves = flatten(x)[0]
        if not leaves:
            raise DTypeError(
                f"{who}: x is {given!r}, expected an array (time and batch are its first axes), or a tree of them"
            )
        if given.__class__ in (list, tuple) and all(leaf.ndim == 0 for leaf in leaves):
            x = asarray(given)  # nested lists of numbers
            leaves = [x]
        for leaf in leaves:
            if leaf.ndim < 2:
                raise ShapeError(f"{who}: x has shape {leaf.shape}, expected at least two axes (time and batch)")
        if isinstance(self.cell, GatedCell):
            expected = "(B, T, {})" if self.batch_first else "(T, B, {})"
            check_input(x, self.cell.input_size, self.cell.weight_ih.dtype, who, expected)
        if self.batch_first:
            x = flipped(x)
            leaves = flatten(x)[0]
        steps, batch = leaves[0].shape[:2]
        if lengths is not None:
            lengths = check_lengths(lengths, steps, batch, who)
        if start is None:
            start = self.start(batch, state)
        outputs, final, trajectories = run_cell(
            self.cell, x, start, lengths=lengths,
            reverse=self.reverse, states=want_states, gates=want_gates, noise=draw_noise(self.cell, steps, batch),
            memory=self.budget(memory),
        )  # fmt: skip
        if self.batch_first:
            outputs = flipped(outputs)
        if not (want_states or want_gates):
            bare = not (self.return_states or self.return_gates) and self.learned_state is None
            usual = type(self).start is Recurrent.start and "start" not in vars(self)
            if plain and bare and usual and self.budget(memory) is None and recording_state().plain:
                keep_recurrent(self, self.cell, self.reverse, x, given, start)
            return outputs, final
        return outputs, final, {key: ops.expand_dims(value, 0) for key, value in trajectories.items()}

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        flags = [f"{flag}=True" for flag in ("reverse", "batch_first") if getattr(self, flag)]
        return ", ".join(flags if self.memory is None else [*flags, f"memory={self.memory}"])


def draw_noise(cell: Any, steps: int, batch: int) -> Any:
    """What a cell draws for all steps before the loop (``cell.noise(steps, batch)``), or None."""
    noise = cell.noise(steps, batch) if getattr(cell, "noise", None) is not None else None
    for shape in map(np.shape, flatten(noise)[0]):
        if shape[:1] != (steps,):
            raise ShapeError(
                f"{type(cell).__name__}.noise({steps}, {batch}) returned shape {shape}, expected ({steps}, ...): "
                "time is axis 0, one entry for each step"
            )
    return noise


def _first_state(cell: Any, batch: int) -> Any:
    """What the cell starts from by itself."""
    try:
        return cell.initial_state(batch)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise  # of what the method does
        who = f"{type(cell).__name__}.initial_state"
        raise misfit(
            error, f"{who}(batch) is asked for the state; this one", cell.initial_state, (batch,), {}
        ) from None


def joined(trajectories: Sequence[Trajectories]) -> Trajectories:
    """Trajectories of several layers along axis 0; where names or widths differ, one entry per layer: ``"0.h"``."""
    names = list(dict.fromkeys(name for one in trajectories for name in one))
    out: Trajectories = {}
    for name in names:
        parts = [one.get(name) for one in trajectories]
        found = [part for part in parts if part is not None]
        if len(found) == len(parts) and len({part.shape[1:] for part in found}) == 1:
            out[name] = ops.concatenate(found, axis=0)
        else:
            out.update({f"{k}.{name}": part for k, part in enumerate(parts) if part is not None})
    return out


def check_between(who: str, dropout: Any, layers: int) -> None:
    """Raise unless it is a probability; warn where there is nothing between layers that could be dropped."""
    if check_probability(who, dropout, "dropout") and layers == 1:
        warnings.warn(
            f"{who}: dropout={dropout} acts between layers, and there is one layer: it changes nothing; put an "
            "nn.Dropout (or nn.VariationalDropout) in front of or behind the layer",
            UserWarning,
            stacklevel=users_level(),
        )


def _as_layer(part: Any, who: str, reverse: bool = False) -> Any:
    """A layer as it is; a cell as a Recurrent."""
    if getattr(part, "returns_state", False):
        return part
    check_cell(part, who)
    return Recurrent(part, reverse=reverse)


class Bidirectional(Budgeted):
    """Two directions over one sequence, their outputs concatenated (Schuster & Paliwal 1997).

    Parameters
    ----------
    fwd, bwd : cells, or Recurrent layers (``bwd`` with ``reverse=True``)
        Two objects: one cell cannot run in both directions.
    memory : int or float, optional
        As in :class:`Recurrent`, in place of what ``fwd`` and ``bwd`` say; bytes are shared out evenly.

    The state is a pair (of ``fwd``, of ``bwd``).

    Raises
    ------
    ArgumentError
        One cell object in both directions, or directions that do not differ.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> layer = nn.Bidirectional(nn.GRUCell(3, 5), nn.GRUCell(3, 5))
    >>> layer(np.ones((7, 2, 3), np.float32))[0].shape
    (7, 2, 10)
    """

    returns_state = True

    def __init__(self, fwd: Any, bwd: Any, *, memory: int | float | None = None) -> None:
        super().__init__()
        self.memory = check_memory(memory, "Bidirectional")
        first, second = _as_layer(fwd, "Bidirectional"), _as_layer(bwd, "Bidirectional", reverse=True)
        if {id(m) for m in first.modules()} & {id(m) for m in second.modules()}:
            raise ArgumentError(
                "Bidirectional: one cell object in both directions; make two cells (or copy.deepcopy the first)"
            )
        if getattr(first, "reverse", False) or not getattr(second, "reverse", True):
            raise ArgumentError("Bidirectional: fwd has reverse=False and bwd has reverse=True")
        if getattr(first, "batch_first", False) != getattr(second, "batch_first", False):
            raise ArgumentError("Bidirectional: fwd and bwd differ in batch_first")
        self.fwd, self.bwd = first, second

    def forward(self, x: Any, state: Any = None, lengths: Any = None, **wanted: Any) -> Any:
        """As :meth:`Recurrent.forward`; the outputs of both directions concatenated on the last axis."""
        if state is not None and not (isinstance(state, (tuple, list)) and len(state) == 2):
            raise ShapeError(f"{describe(self)}: the state is a pair (of fwd, of bwd), found a {type(state).__name__}")
        one, two = (None, None) if state is None else state
        wanted = self.sharing(wanted, 2)
        first, second = self.fwd(x, one, lengths, **wanted), self.bwd(x, two, lengths, **wanted)
        outputs = tree_map(lambda a, b: ops.concatenate([a, b], axis=-1), first[0], second[0])
        final = (first[1], second[1])
        return (outputs, final) if len(first) == 2 else (outputs, final, joined([first[2], second[2]]))


class Stack(Budgeted):
    """Recurrent layers one on top of the other; cells in the list are wrapped in :class:`Recurrent`.

    Parameters
    ----------
    layers : list of cells and layers
    dropout : float
        On the outputs between layers, in training (Zaremba et al. 2014).
    memory : int or float, optional
        As in :class:`Recurrent`, in place of what the layers say; bytes are shared out evenly.

    The state is a list, one per layer.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> layer = nn.Stack([nn.LSTMCell(3, 5), nn.GRUCell(5, 4)])
    >>> outputs, states = layer(np.ones((7, 2, 3), np.float32))
    >>> outputs.shape, len(states)
    ((7, 2, 4), 2)
    """

    returns_state = True

    def __init__(self, layers: Sequence[Any], dropout: float = 0.0, *, memory: int | float | None = None) -> None:
        super().__init__()
        self.memory = check_memory(memory, "Stack")
        if not isinstance(layers, Iterable):
            raise DTypeError(f"Stack: layers are a list, found a {type(layers).__name__}; write Stack([layer])")
        layers = list(layers)
        if not layers:
            raise ArgumentError("Stack: at least one layer is needed, found an empty list")
        check_between("Stack", dropout, len(layers))
        self.layers = [_as_layer(layer, "Stack") for layer in layers]
        self.dropout = dropout

    def forward(self, x: Any, state: Any = None, lengths: Any = None, **wanted: Any) -> Any:
        """As :meth:`Recurrent.forward`."""
        if state is not None and not (isinstance(state, (tuple, list)) and len(state) == len(self.layers)):
            found = f"{len(state)} parts" if isinstance(state, (tuple, list)) else f"a {type(state).__name__}"
            raise ShapeError(
                f"{describe(self)}: the state is a list of {len(self.layers)}, one per layer, found {found}"
            )
        wanted = self.sharing(wanted, len(self.layers))
        finals, trajectories = [], []
        for k, layer in enumerate(self.layers):
            if k:
                x = tree_map(lambda leaf: ops.dropout(leaf, self.dropout, None, self.training), x)
            result = layer(x, None if state is None else state[k], lengths, **wanted)
            x = result[0]
            finals.append(result[1])
            trajectories += result[2:]
        return (x, finals) if not trajectories else (x, finals, joined(trajectories))
