"""The tape: the reverse replay, and the Tape that keeps everything.

The implicit tape of an output is what can be reached from it through :mod:`tinygrad_lstm.record`;
``with Tape()`` keeps the list as well.  Both are replayed by the one function :func:`replay`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_lstm.errors import DTypeError, GraphError, ShapeError
from tinygrad_lstm.ownership import counted, is_pending_alone
from tinygrad_lstm.record import _STATE, Node, Output, Record, eager, name, no_grad, recording, scope, state
from tinygrad_lstm.storage import untouched, verify

if TYPE_CHECKING:
    from tinygrad_lstm.inspect.table import Table
    from tinygrad_lstm.program import Program
    from tinygrad_lstm.tensor import Tensor

__all__ = [
    "Node", "Output", "Record", "Tape", "differentiate", "eager", "name", "no_grad", "observed", "paths", "recording",
    "replay", "run_hooks", "scope", "state",
]  # fmt: skip


def replay(
    targets: Iterable[tuple[Node, Tensor]],
    *,
    free: bool,
    sources: set[Node] | None = None,
    through: set[int] | None = None,
    retained: list[tuple[Any, Tensor]] | None = None,
    frontier: bool = False,
) -> dict[Node, Tensor]:
    """Replay the tape behind ``targets`` in descending serial order; return the cotangents of the leaves.

    ``targets`` are (node, cotangent) pairs.  With ``sources`` the cotangents of those nodes are returned
    instead, and only records whose serial is in ``through`` are replayed (see :func:`paths`).  ``free``
    releases every record as soon as its rules have run.  ``retained`` is filled with (weak reference, gradient)
    pairs of the values that retain_grad was called on.

    Serials grow along every edge, so a heap of pending records meets each of them after all its consumers:
    no recursion, no sort of the graph.  Nothing outside of the graph is written, so a rule or a hook that
    raises leaves every ``.grad`` as it was.
    """
    pending: dict[Any, Any] = {}  # node -> cotangent so far (a list of them for a record with several outputs)
    found: dict[Node, Tensor] = {}
    owned: set[Any] = set()  # nodes whose pending cotangent is a buffer made here: the only ones added to in place
    heap: list[tuple[int, Record]] = []
    in_place = not _STATE.get().enabled  # while the replay is itself recorded, values must stay as they are

    def add(node: Any, cotangent: Tensor) -> None:
        kind = node.__class__
        if kind is Output:
            outputs = pending.get(node.record)
            if outputs is None:
                outputs = pending[node.record] = [None] * len(node.record.output_avals)
                heapq.heappush(heap, (-node.record.serial, node.record))
            present = outputs[node.index]
            outputs[node.index] = cotangent if present is None else present + cotangent
            return
        present = pending.get(node)
        if present is None:
            pending[node] = cotangent
            if kind is Record:
                heapq.heappush(heap, (-node.serial, node))
        elif node in owned or (in_place and is_pending_alone(counted(present), present)):
            present._data += cotangent._data
            owned.add(node)
        else:
            pending[node] = present + cotangent
            if in_place:
                owned.add(node)

    for node, cotangent in targets:
        add(node, cotangent)
    while heap:
        record = heapq.heappop(heap)[1]
        cotangent = pending.pop(record)
        owned.discard(record)
        if record.extra is not None and record.extra.hooks is not None:
            cotangent = _run_hooks(record, cotangent)
        if retained is not None and record.extra is not None and record.extra.retained is not None:
            for index, kept in record.extra.retained.items():
                value = cotangent if record.output_avals is None else cotangent[index]
                if value is not None:
                    retained.append((kept, value))
        if sources is not None:
            _collect(record, cotangent, sources, found)
            if record.serial not in through:  # type: ignore[operator]
                continue
            if frontier and record.output_avals is not None:
                cotangent = _without(record, cotangent, sources)  # type: ignore[assignment]
        if record.parents is None:
            raise GraphError(
                f"the graph behind {record.describe()} was freed by an earlier backward; "
                "pass retain_graph=True to the first backward to go through it again (or detach() what was carried "
                "over from there, such as the state of a recurrent layer)"
            )
        if not record.parents:  # a constant, as what only a Tape recorded is when that has died
            continue
        primitive = record.primitive
        if not primitive.saves_nothing and not untouched(record):
            verify(record)
        wanted: list[bool] | None = None  # all
        if sources is not None:
            wanted = [parent is not None and _leads(parent, sources, through) for parent in record.parents]
            if not any(wanted):  # a constant that a Tape recorded
                continue
        if in_place and primitive.accumulate is not None and _goes_into(record, wanted):
            # A slice's cotangent goes straight into the buffer of the whole: T slices cost T, not T * T.
            parent = record.parents[0]
            wanted = [False] * len(record.parents)  # only the first input of such a primitive has a gradient
            if parent not in owned:
                present = pending.get(parent)
                pending[parent] = _owned_copy(parent, present)
                owned.add(parent)
                if present is None and parent.__class__ is Record:
                    heapq.heappush(heap, (-parent.serial, parent))
            primitive.accumulate(pending[parent]._data, cotangent._data, record)
        shares = primitive.pull(record, cotangent, wanted)
        for k, parent in enumerate(record.parents):
            share, shares[k] = shares[k], None  # nothing here holds on to it
            if share is None:
                continue
            kind = parent.__class__
            if kind is Output or parent in pending:
                add(parent, share)
                continue
            pending[parent] = share
            if kind is Record:
                heapq.heappush(heap, (-parent.serial, parent))
        if free and not (record.extra is not None and record.extra.tapes):  # a living Tape keeps what it recorded
            record.release()
    if sources is None:
        return pending  # only leaves are left
    for node in sources & pending.keys():
        found[node] = pending[node]
    return found


def _goes_into(record: Record, wanted: list[bool] | None) -> bool:
    parent = record.parents[0]  # type: ignore[index]
    return parent is not None and parent.__class__ is not Output and (wanted is None or wanted[0])


def _leads(node: Any, sources: set[Node], through: set[int] | None) -> bool:
    if node in sources:
        return True
    if node.__class__ is Record:
        return node.serial in through  # type: ignore[operator]
    return node.__class__ is Output and node.record.serial in through  # type: ignore[operator]


def _collect(record: Record, cotangent: Any, sources: set[Node], found: dict[Node, Tensor]) -> None:
    if record.output_avals is None:
        if record in sources:
            found[record] = cotangent
        return
    for node in sources:
        if node.__class__ is Output and node.record is record and cotangent[node.index] is not None:
            found[node] = cotangent[node.index]


def _without(record: Record, cotangents: list[Any], sources: set[Node]) -> list[Any]:
    """The cotangents of the outputs that are no sources themselves."""
    mine = {node.index for node in sources if node.__class__ is Output and node.record is record}
    return [None if k in mine else c for k, c in enumerate(cotangents)]


def _owned_copy(node: Any, present: Tensor | None) -> Tensor:
    from tinygrad_lstm.tensor import Tensor  # here: tensor.py stands above the tape

    if present is None:
        return Tensor(np.zeros(node.shape, node.dtype))
    return Tensor(np.array(present._data))


def _run_hooks(record: Record, cotangent: Any) -> Any:
    hooks_by_output = record.more().hooks or {}
    for index, hooks in hooks_by_output.items():
        value = cotangent if record.output_avals is None else cotangent[index]
        if value is None:
            continue
        value = run_hooks(hooks, value, record.describe())
        if record.output_avals is None:
            cotangent = value
        else:
            cotangent[index] = value
    return cotangent


def run_hooks(hooks: Iterable[Callable[..., Any]], cotangent: Tensor, where: str) -> Tensor:
    """Call hooks in the order of their registration; one that returns a value replaces the cotangent."""
    from tinygrad_lstm.tensor import as_like

    for hook in list(hooks):
        result = hook(cotangent)
        if result is None:
            continue
        replacement = as_like(result, cotangent.dtype)
        if replacement.shape != cotangent.shape:
            raise ShapeError(
                f"a hook on {where} returned a gradient of shape {replacement.shape}, expected {cotangent.shape}"
            )
        cotangent = replacement
    return cotangent


def paths(
    targets: Iterable[Node], sources: set[Node], since: int = 0, frontier: bool = False, tape: Tape | None = None
) -> tuple[set[int], bool]:
    """The serials of the records that lie between sources and targets, and whether anything else is behind.

    Of the records that exist only because some Tape was active, those of ``tape`` count, if one is given: what another
    tape kept is a constant for it, as it is where there is no other tape.

    The second result is True where the targets also depend on leaves, or on older records, that are no
    sources: then (and only then) a first gradient can itself be differentiated with respect to them.
    """
    floor = max(since, min((_serial(node) for node in sources), default=0))
    own = None if tape is None else {record.serial for record, _, _ in tape.entries}
    reached: dict[int, Record] = {}
    stack: list[Any] = list(targets)
    foreign = False
    while stack:
        node = stack.pop()
        if frontier and node in sources:
            continue
        record = node.record if node.__class__ is Output else node
        if record.__class__ is not Record:
            foreign = foreign or (node not in sources and node.requires_grad)
        elif record.serial <= floor:
            foreign = foreign or node not in sources
        elif own is not None and record.serial not in own and record.extra is not None and record.extra.tape_only:
            continue
        elif record.serial not in reached:
            reached[record.serial] = record
            if record.parents is not None:
                stack.extend(parent for parent in record.parents if parent is not None)
    through: set[int] = set()
    for serial in sorted(reached):
        parents = reached[serial].parents
        if parents is None or any(p is not None and _leads(p, sources, through) for p in parents):
            through.add(serial)
    return through, foreign


def _serial(node: Any) -> int:
    if node.__class__ is Record:
        return node.serial
    return node.record.serial if node.__class__ is Output else 0


def differentiate(
    targets: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    sources: Sequence[Tensor],
    *,
    since: int = 0,
    frontier: bool = False,
    tape: Tape | None = None,
) -> list[Tensor | None]:
    """Cotangents of ``sources``, given those of ``targets``: the replay that grad, vjp and Tape.gradient share.

    It is recorded (for a derivative of the next order) only where the result can depend on something that
    is itself being differentiated, see :func:`observed`.  No source is older than the serial ``since``.
    With ``frontier`` the replay stops at the sources: what lies behind them is somebody else's to replay.
    ``tape`` is the Tape that asks, see :func:`paths`.
    """
    nodes = [source._node or source for source in sources]
    starts = [target._node or target for target in targets]
    through, foreign = paths(starts, set(nodes), since, frontier, tape)
    current = _STATE.get()
    again = current.enabled and (foreign or observed(sources) or any(c._rg for c in cotangents))
    with recording(enabled=again), np.errstate(divide="ignore", invalid="ignore"):
        found = replay(
            zip(starts, cotangents, strict=True), free=False, sources=set(nodes), through=through, frontier=frontier
        )
    return [found.get(node) for node in nodes]


def observed(sources: Iterable[Tensor]) -> bool:
    """Whether somebody may differentiate again: an active tape or trace, or a source with a differentiable past."""
    current = _STATE.get()
    return bool(current.tapes) or current.trace is not None or any(s._rg and _has_past(s._node) for s in sources)


def _has_past(node: Any) -> bool:
    if node.__class__ is Output:
        node = node.record
    if node.__class__ is not Record:
        return False
    return node.parents is not None and any(parent is not None for parent in node.parents)


# ---------------------------------------------------------------------------- the explicit tape


class Tape:
    """Keep everything that runs inside, whether or not it requires a gradient.

    The tape holds the values until it dies; :meth:`gradient` may be called as often as wanted, also after
    the block.  Nested tapes both record.

    >>> import tinygrad_lstm as tg
    >>> x = tg.tensor([3.0])
    >>> with tg.Tape() as tape:
    ...     y = (x * x).sum()
    >>> tape.gradient(y, x).tolist()
    [6.0]
    >>> [record.primitive.name for record in tape.records]
    ['multiply', 'sum']
    """

    def __init__(self) -> None:
        self.entries: list[tuple[Record, tuple[Any, ...], tuple[Tensor, ...]]] = []
        self._token: Any = None

    def __enter__(self) -> Tape:
        if self._token is not None:
            raise GraphError("this Tape is already recording; make a second Tape() to nest them")
        current = _STATE.get()
        self._token = _STATE.set(current.replaced(tapes=(*current.tapes, self)))
        return self

    def __exit__(self, *exc: object) -> None:
        token, self._token = self._token, None
        _STATE.reset(token)

    def __del__(self) -> None:
        for record, _, _ in self.entries:
            extra = record.more()
            extra.tapes -= 1
            if extra.tapes == 0:
                extra.inputs = None
                if extra.tape_only:  # nobody else can ask for its gradient: its value is a constant from now on
                    record.release()
                    record.parents = ()

    def add(self, record: Record, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        """Called by the mechanism for every record that is made while the tape is active."""
        extra = record.more()
        extra.tapes += 1
        extra.inputs = inputs
        self.entries.append((record, inputs, outputs))

    @property
    def records(self) -> list[Record]:
        """The records in the order in which they ran."""
        return [record for record, _, _ in self.entries]

    def outputs(self, record: Record) -> tuple[Tensor, ...]:
        """The tensors that a record of this tape made."""
        return next(outputs for candidate, _, outputs in self.entries if candidate is record)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        return str(self.to_program())

    def __repr__(self) -> str:
        return f"<Tape of {len(self.entries)} records>"

    def to_program(self, inputs: Sequence[Tensor] | None = None, outputs: Sequence[Tensor] | None = None) -> Program:
        """The tape as an immutable, value-free :class:`~tinygrad_lstm.program.Program`.

        ``inputs`` become its arguments; every other tensor that was used but not made here becomes a capture.
        ``outputs`` default to all values that nothing on the tape consumes.
        """
        from tinygrad_lstm.program import lower

        return lower(self.entries, inputs, outputs)[0]

    def to_table(self, t: Any = None, module: str | None = None, gate: Any = None) -> Table:
        """The values on the tape as a :class:`~tinygrad_lstm.inspect.Table`, one row each.

        ``t`` chooses time steps (an int or several), ``module`` what ran in a path or below it (``""``: outside of
        all), ``gate`` values with that ``tg.name`` (a str or several).  Raises ArgumentError where nothing is so named.
        """
        from tinygrad_lstm.inspect.table import table_of

        return table_of(self, t, module, gate)

    def gradient(self, target: Tensor, sources: Any, cotangent: Any = None) -> Any:
        """Gradients of ``target`` with respect to ``sources`` by replaying the tape in reverse.

        Parameters
        ----------
        target : Tensor
            What to differentiate; a scalar unless ``cotangent`` is given.
        sources : Tensor, or a list, tuple, dict or iterator of them
            Any values on the tape, gates and states included.
        cotangent : array or Tensor of target's shape, optional

        Returns
        -------
        Tensors in the structure of ``sources``; None where there is no path.  A compiled loop is one record, so there
        is none from one of its outputs to another, such as from a gate in a layer's trajectories to its output: run
        the model inside of ``tg.eager()`` and take the gate's value from the tape (:meth:`outputs`).
        """
        from tinygrad_lstm.tensor import Tensor, seed_cotangent
        from tinygrad_lstm.tree import flatten, unflatten

        if isinstance(sources, Iterator):  # module.parameters()
            sources = list(sources)
        leaves, treedef = flatten(sources)
        seed = seed_cotangent(target, cotangent, "Tape.gradient")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise DTypeError(
                    f"Tape.gradient: sources are Tensors, found {type(leaf).__name__}; compute with tg.asarray(x), and "
                    "ask for the gradient of that"
                )
        return unflatten(treedef, differentiate([target], [seed], leaves, tape=self))
