"""The tape: what is recorded, and the one reverse replay.

Running a primitive on tensors makes a :class:`Record`.  A tensor strongly refers to the record that made
it, a record to the nodes that its inputs came from; so the tape of an output is whatever can be reached
from it, and reference counting frees it.  ``with Tape()`` keeps the list as well.

A *node* is where a value came from, and the key under which its cotangent is accumulated: the
:class:`Record` itself for a primitive with one output, an :class:`Output` for one of several, the tensor
for a leaf.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from types import CodeType
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from tinygrad_lstm.errors import GraphError, ShapeError

if TYPE_CHECKING:
    from tinygrad_lstm.primitive import Primitive
    from tinygrad_lstm.program import Program
    from tinygrad_lstm.tensor import Tensor

__all__ = [
    "Output",
    "Record",
    "State",
    "Tape",
    "differentiate",
    "eager",
    "name",
    "no_grad",
    "observed",
    "replay",
    "scope",
    "state",
]


class State:
    """The recording state: immutable, replaced as a whole, one per thread and async task (a context variable)."""

    __slots__ = ("eager", "enabled", "names", "step", "tapes", "trace", "where")

    def __init__(
        self,
        enabled: bool = True,
        tapes: tuple[Tape, ...] = (),
        trace: Any = None,
        where: str = "",
        step: int | None = None,
        names: dict[str, Any] | None = None,
        eager: bool = False,
    ) -> None:
        self.enabled = enabled  # False under no_grad: nothing is recorded
        self.tapes = tapes  # every active Tape, outermost first
        self.trace = trace  # the Trace that is recording data-free tensors, or None
        self.where = where  # module path, from scope()
        self.step = step  # time step of an eager loop, or None
        self.names = names  # collects the values named with tg.name, or None
        self.eager = eager  # True under tg.eager(): scan runs its body step by step, op by op

    def replaced(self, **changes: Any) -> State:
        """This state with some fields changed."""
        return State(**{**{field: getattr(self, field) for field in State.__slots__}, **changes})


_STATE: ContextVar[State] = ContextVar("tinygrad_lstm_recording", default=State())  # noqa: B039 - a State is never changed
_serials = itertools.count(1)


def state() -> State:
    """The recording state in force here."""
    return _STATE.get()


@contextmanager
def recording(**changes: Any) -> Iterator[None]:
    """Change fields of the recording state for a block; restored also when the block raises."""
    token = _STATE.set(_STATE.get().replaced(**changes))
    try:
        yield
    finally:
        _STATE.reset(token)


class Extra:
    """What few records have; made on demand so that the common record stays small."""

    __slots__ = ("guards", "hooks", "inputs", "label", "tape_only", "tapes")

    def __init__(self) -> None:
        self.guards: dict[int, Any] | None = None  # fingerprints of saved values that others could write to
        self.hooks: dict[int, list[Callable[..., Any]]] | None = None  # by output index
        self.inputs: tuple[Any, ...] | None = None  # while a Tape keeps the values
        self.label: dict[int, str] | None = None  # names given with tg.name, by output index
        self.tape_only = False  # recorded only because a Tape was active
        self.tapes = 0  # how many Tapes own this record


class Record:
    """One line of the tape: which primitive ran, on what, with which parameters, and what it keeps.

    ``parents`` are the nodes of the inputs (None where no gradient flows; the whole is None once freed).
    ``saved`` is what the VJP rules name: input tensors in their positions, then the output.
    ``state`` says where and when (module path, time step), ``code`` and ``lasti`` from which source line.
    """

    __slots__ = (
        "__weakref__",
        "code",
        "dtype",
        "extra",
        "lasti",
        "output_avals",
        "params",
        "parents",
        "primitive",
        "saved",
        "serial",
        "shape",
        "shapes",
        "state",
    )  # fmt: skip

    def __init__(
        self, primitive: Primitive, params: dict[str, Any], parents: tuple[Any, ...], saved: tuple[Any, ...],
        shape: Any, dtype: Any, shapes: Any, output_avals: Any, state: State, code: Any, lasti: int,
    ) -> None:  # fmt: skip
        self.primitive = primitive
        self.params = params
        self.parents: tuple[Any, ...] | None = parents
        self.saved: tuple[Any, ...] | None = saved
        self.shape = shape  # of the one output; a record of several has them in output_avals
        self.dtype = dtype
        self.shapes = shapes  # of all inputs, where a rule asks for them
        self.output_avals = output_avals
        self.state = state
        self.code: CodeType | None = code
        self.lasti = lasti
        self.serial = next(_serials)
        self.extra: Extra | None = None

    def more(self) -> Extra:
        """The rare fields, made on demand."""
        if self.extra is None:
            self.extra = Extra()
        return self.extra

    @property
    def inputs(self) -> tuple[Any, ...] | None:
        """The operands (tensors and Python numbers), while a Tape keeps them."""
        return None if self.extra is None else self.extra.inputs

    @property
    def label(self) -> str | None:
        """The name given to the (first) output with ``tg.name``."""
        return None if self.extra is None or self.extra.label is None else self.extra.label.get(0)

    def source_line(self) -> str:
        """``file:line`` of the user's code that ran the primitive; formatted only when somebody looks."""
        if self.code is None:
            return "<unknown>"
        line = self.code.co_firstlineno
        for start, end, at in self.code.co_lines():
            if start <= self.lasti < end and at is not None:
                line = at
                break
        return f"{self.code.co_filename}:{line}"

    def describe(self) -> str:
        """For messages: ``'tanh' (encoder.l0, t=3, model.py:12)``."""
        label = f" {self.label!r}" if self.label else ""
        step = "" if self.state.step is None else f"t={self.state.step}"
        place = [part for part in (self.state.where, step) if part]
        return f"'{self.primitive.name}'{label} ({', '.join([*place, self.source_line()])})"

    def release(self) -> None:
        """Forget inputs and saved values: the chain behind this record can be freed."""
        self.parents = None
        self.saved = None
        if self.extra is not None:
            self.extra.inputs = self.extra.guards = None

    def __repr__(self) -> str:
        return f"<Record {self.serial} {self.describe()}>"


class Output:
    """One output of a record that has several."""

    __slots__ = ("dtype", "index", "record", "shape")

    def __init__(self, record: Record, index: int, shape: Any, dtype: Any) -> None:
        self.record = record
        self.index = index
        self.shape = shape
        self.dtype = dtype


Node = Union["Record", "Output", "Tensor"]


# ---------------------------------------------------------------------------- the reverse replay


def replay(
    targets: Iterable[tuple[Node, Tensor]],
    *,
    free: bool,
    sources: set[Node] | None = None,
    through: set[int] | None = None,
) -> dict[Node, Tensor]:
    """Replay the tape behind ``targets`` in descending serial order; return the cotangents of the leaves.

    ``targets`` are (node, cotangent) pairs.  With ``sources`` the cotangents of those nodes are returned
    instead, and only records whose serial is in ``through`` are replayed (see :func:`paths`).  ``free``
    releases every record as soon as its rules have run.

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
        elif node in owned:
            present._data += cotangent._data
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
        if sources is not None:
            _collect(record, cotangent, sources, found)
            if record.serial not in through:  # type: ignore[operator]
                continue
        if record.parents is None:
            raise GraphError(
                f"the graph behind {record.describe()} was freed by an earlier backward; "
                "pass retain_graph=True to the first backward to go through it again"
            )
        primitive = record.primitive
        primitive.verify(record)
        if sources is None:
            wanted = [parent is not None for parent in record.parents]
        else:
            wanted = [parent is not None and _leads(parent, sources, through) for parent in record.parents]
        if in_place and primitive.accumulate is not None and wanted[0] and record.parents[0].__class__ is not Output:
            # A slice's cotangent goes straight into the buffer of the whole: T slices cost T, not T * T.
            parent, wanted[0] = record.parents[0], False
            if parent not in owned:
                present = pending.get(parent)
                pending[parent] = _owned_copy(parent, present)
                owned.add(parent)
                if present is None and parent.__class__ is Record:
                    heapq.heappush(heap, (-parent.serial, parent))
            primitive.accumulate(pending[parent]._data, cotangent._data, record)
        for parent, share in zip(record.parents, primitive.pull(record, cotangent, wanted), strict=True):
            if share is not None:
                add(parent, share)
        if free:
            record.release()
    if sources is None:
        return pending  # only leaves are left
    for node in sources & pending.keys():
        found[node] = pending[node]
    return found


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
    from tinygrad_lstm.tensor import Tensor, asarray

    for hook in list(hooks):
        result = hook(cotangent)
        if result is None:
            continue
        replacement = result if isinstance(result, Tensor) else asarray(result)
        if replacement.shape != cotangent.shape:
            raise ShapeError(
                f"a hook on {where} returned a gradient of shape {replacement.shape}, expected {cotangent.shape}"
            )
        cotangent = replacement
    return cotangent


def paths(targets: Iterable[Node], sources: set[Node]) -> tuple[set[int], bool]:
    """The serials of the records that lie between sources and targets, and whether anything else is behind.

    The second result is True where the targets also depend on leaves, or on older records, that are no
    sources: then (and only then) a first gradient can itself be differentiated with respect to them.
    """
    floor = min((_serial(node) for node in sources), default=0)
    reached: dict[int, Record] = {}
    stack: list[Any] = list(targets)
    foreign = False
    while stack:
        node = stack.pop()
        record = node.record if node.__class__ is Output else node
        if record.__class__ is not Record:
            foreign = foreign or (node not in sources and node.requires_grad)
        elif record.serial <= floor:
            foreign = foreign or node not in sources
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


# ---------------------------------------------------------------------------- what the user opens and closes


class no_grad(ContextDecorator):
    """Record nothing inside: a context manager and a decorator.  It wins over everything.

    >>> import tinygrad_lstm as tg
    >>> x = tg.tensor([1.0], requires_grad=True)
    >>> with tg.no_grad():
    ...     y = x * 2
    >>> y.requires_grad
    False
    """

    def __enter__(self) -> no_grad:
        self._tokens = [*getattr(self, "_tokens", ()), _STATE.set(_STATE.get().replaced(enabled=False))]
        return self

    def __exit__(self, *exc: object) -> None:
        _STATE.reset(self._tokens.pop())

    def _recreate_cm(self) -> no_grad:
        return no_grad()  # a decorated function may recurse or run in several threads


@contextmanager
def scope(path: str) -> Iterator[None]:
    """Open a path for provenance: records made inside carry ``outer.path``.

    Parameters
    ----------
    path : str
        One or more components, such as ``"encoder"``; nested scopes are joined with dots.
    """
    where = _STATE.get().where
    with recording(where=f"{where}.{path}" if where else path):
        yield


def name(t: Tensor, label: str) -> Tensor:
    """Give a value a name for provenance (``i`` for an input gate) and return the same tensor.

    Selections by gate, printed programs and error messages use it.  Free when nothing is recorded.
    """
    names = _STATE.get().names
    if names is not None:
        names[label] = t
    node = t._node
    if node is None:
        t._more().label = label
    else:
        record, index = (node.record, node.index) if isinstance(node, Output) else (node, 0)
        extra = record.more()
        extra.label = {**(extra.label or {}), index: label}
    return t


@contextmanager
def eager() -> Iterator[None]:
    """Run scans and recurrent layers op by op: the readable path, every step and gate on the tape."""
    with recording(eager=True):
        yield


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
                if extra.tape_only:  # nobody else can ask for its gradient: cut the chain behind it
                    record.release()

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

    def gradient(self, target: Tensor, sources: Any, cotangent: Any = None) -> Any:
        """Gradients of ``target`` with respect to ``sources`` by replaying the tape in reverse.

        Parameters
        ----------
        target : Tensor
            What to differentiate; a scalar unless ``cotangent`` is given.
        sources : Tensor, or a list, tuple or dict of them
            Any values on the tape, gates and states included.
        cotangent : array or Tensor of target's shape, optional

        Returns
        -------
        Tensors in the structure of ``sources``; None where there is no path.
        """
        from tinygrad_lstm.tensor import seed_cotangent
        from tinygrad_lstm.tree import flatten, unflatten

        leaves, treedef = flatten(sources)
        seed = seed_cotangent(target, cotangent, "Tape.gradient")
        return unflatten(treedef, differentiate([target], [seed], leaves))


def differentiate(
    targets: Sequence[Tensor], cotangents: Sequence[Tensor], sources: Sequence[Tensor], *, free: bool = False
) -> list[Tensor | None]:
    """Cotangents of ``sources``, given those of ``targets``: the replay that grad, vjp and Tape.gradient share.

    It is recorded (for a derivative of the next order) only where the result can depend on something that
    is itself being differentiated, see :func:`observed`.
    """
    nodes = [source._node or source for source in sources]
    starts = [target._node or target for target in targets]
    through, foreign = paths(starts, set(nodes))
    current = _STATE.get()
    again = current.enabled and (foreign or observed(sources) or any(c._rg for c in cotangents))
    with recording(enabled=again), np.errstate(divide="ignore", invalid="ignore"):
        found = replay(zip(starts, cotangents, strict=True), free=free, sources=set(nodes), through=through)
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
