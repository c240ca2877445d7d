"""What is recorded: the Record of one application, and the state that says whether and where it is kept.

Running a primitive on tensors makes a :class:`Record`.  A tensor strongly refers to the record that made
it, a record to the nodes that its inputs came from; so the tape of an output is whatever can be reached
from it, and reference counting frees it.

A *node* is where a value came from, and the key under which its cotangent is accumulated: the
:class:`Record` itself for a primitive with one output, an :class:`Output` for one of several, the tensor
for a leaf.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from types import CodeType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np

from tinygrad_lstm.errors import DTypeError, GraphError

if TYPE_CHECKING:
    from tinygrad_lstm.primitive import Primitive
    from tinygrad_lstm.tape import Tape
    from tinygrad_lstm.tensor import Tensor

__all__ = [
    "Aval", "Node", "Output", "Record", "State", "eager", "name", "no_grad", "note_parts", "note_selected", "part_name",
    "recording",
    "scope", "state",
]  # fmt: skip


class Aval(NamedTuple):
    """What is known of a value without its data."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{np.dtype(self.dtype).name}[{','.join(map(str, self.shape))}]"


class Place(NamedTuple):
    """What a record keeps of the recording state (keeping all of it would tie every record to its tapes)."""

    where: str
    step: int | None


class State:
    """The recording state: immutable, replaced as a whole, one per thread and async task (a context variable)."""

    __slots__ = ("_silent", "eager", "enabled", "names", "place", "plain", "step", "tapes", "trace", "where")

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
        self.place = Place(where, step)
        # Whether nobody looks at single operations.
        self.plain = trace is None and names is None and not tapes and not eager
        self._silent: State | None = None

    def silent(self) -> State:
        """This state with nothing recorded; made once."""
        found = self._silent
        if found is None:
            found = self._silent = self.replaced(enabled=False)
        return found

    def replaced(self, **changes: Any) -> State:
        """This state with some fields changed."""
        return State(
            **{
                "enabled": self.enabled, "tapes": self.tapes, "trace": self.trace, "where": self.where,
                "step": self.step, "names": self.names, "eager": self.eager, **changes,
            }
        )  # fmt: skip

    def at(self, where: str) -> State:
        """This state at another module path."""
        return State(self.enabled, self.tapes, self.trace, where, self.step, self.names, self.eager)


_STATE: ContextVar[State] = ContextVar("tinygrad_lstm_recording", default=State())  # noqa: B039 - a State is never changed
_serials = itertools.count(1)


def state() -> State:
    """The recording state in force here."""
    return _STATE.get()


def now() -> int:
    """A serial between those of the records made before and after the call."""
    return next(_serials)


SILENT = State(enabled=False)  # nothing is recorded: what ``backward`` runs in


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

    __slots__ = ("hooks", "inputs", "label", "part", "retained", "selected", "tape_only", "tapes")

    def __init__(self) -> None:
        self.hooks: dict[int, list[Callable[..., Any]]] | None = None  # by output index
        self.inputs: tuple[Any, ...] | None = None  # while a Tape keeps the values
        self.label: dict[int, str] | None = None  # names given with tg.name, by output index
        self.part: dict[int, str] | None = None  # names as parts of a loop's state, by output index
        self.retained: dict[int, Any] | None = None  # weak references to outputs whose gradient is kept, by index
        self.selected = False  # whether it chose, by lengths, between a step's new state and the old one
        self.tape_only = False  # recorded only because a Tape was active
        self.tapes = 0  # how many Tapes own this record


class Record:
    """One line of the tape: which primitive ran, on what, with which parameters, and what it keeps.

    ``parents`` are the nodes of the inputs (None where no gradient flows; the whole is None once freed).
    ``saved`` is what the VJP rules name: input tensors in their positions, then the output.
    ``place`` says where and when (module path, time step), ``code`` and ``lasti`` from which source line.
    """

    __slots__ = (
        "__weakref__",
        "code",
        "dtype",
        "extra",
        "guards",
        "lasti",
        "marked",
        "output_avals",
        "params",
        "parents",
        "place",
        "primitive",
        "saved",
        "serial",
        "shape",
        "shapes",
    )  # fmt: skip

    def __init__(
        self, primitive: Primitive, params: dict[str, Any], parents: tuple[Any, ...], saved: tuple[Any, ...],
        shape: Any, dtype: Any, shapes: Any, output_avals: Any, place: Place, code: Any, lasti: int,
    ) -> None:  # fmt: skip
        self.primitive = primitive
        self.params = params
        self.parents: tuple[Any, ...] | None = parents
        self.saved: tuple[Any, ...] | None = saved
        self.shape = shape  # of the one output; a record of several has them in output_avals
        self.dtype = dtype
        self.shapes = shapes  # of all inputs, where a rule asks for them
        self.output_avals = output_avals
        self.place = place
        self.code: CodeType | None = code
        self.lasti = lasti
        self.serial = next(_serials)
        self.extra: Extra | None = None
        self.guards: dict[int, Any] | None = None  # what is remembered of saved values that others could write to
        self.marked = False  # whether a fingerprint of something that others hold is among that

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
        step = "" if self.place.step is None else f"t={self.place.step}"
        place = [part for part in (self.place.where, step) if part]
        return f"'{self.primitive.name}'{label} ({', '.join([*place, self.source_line()])})"

    def release(self) -> None:
        """Forget inputs and saved values: the chain behind this record can be freed."""
        self.parents = None
        self.saved = None
        self.guards = None
        if self.extra is not None:
            self.extra.inputs = None

    def __repr__(self) -> str:
        return f"<Record {self.serial} {self.describe()}>"


class Output:
    """One output of a record that has several."""

    __slots__ = ("index", "record")

    def __init__(self, record: Record, index: int) -> None:
        self.record = record
        self.index = index

    @property
    def shape(self) -> Any:
        """The shape of the output."""
        return self.record.output_avals[self.index].shape

    @property
    def dtype(self) -> Any:
        """The dtype of the output."""
        return self.record.output_avals[self.index].dtype


Node = Union["Record", "Output", "Tensor"]


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

    _function: Any = None  # of @tg.no_grad without parentheses: what stands in for the function

    def __init__(self, function: Any = None) -> None:
        self._entered: list[Any] = []  # tokens: one object may be entered again, also in several threads and tasks
        if function is not None:
            self._function = self._silenced(function)
            functools.update_wrapper(self, function)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if self._function is None or instance is None else MethodType(self._function, instance)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A decorated function is pickled as any other: by its name."""
        return super().__reduce_ex__(protocol) if self._function is None else vars(self)["__qualname__"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A function in which nothing is recorded; of a generator function, no step of it."""
        if self._function is not None:
            return self._function(*args, **kwargs)
        return self._silenced(*args, **kwargs)

    def _silenced(self, function: Any) -> Any:
        if not callable(function):
            raise DTypeError(f"no_grad decorates a function, found {type(function).__name__}")
        if inspect.isasyncgenfunction(function):
            raise DTypeError("no_grad cannot decorate an async generator; open `with tg.no_grad():` inside of it")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with no_grad():
                    return await function(*args, **kwargs)

            return awaited
        if inspect.isgeneratorfunction(function):
            return functools.wraps(function)(lambda *args, **kwargs: _silent_steps(function(*args, **kwargs)))
        return super().__call__(function)

    def __enter__(self) -> no_grad:
        self._entered.append(_STATE.set(_STATE.get().silent()))
        return self

    def __exit__(self, *exc: object) -> None:
        for token in reversed(self._entered):
            try:
                _STATE.reset(token)
            except (ValueError, RuntimeError):  # of another thread or task, where it may have been used just now
                continue
            self._entered.remove(token)
            return
        raise GraphError("no_grad was left in another thread or task than it was entered in")

    def _recreate_cm(self) -> no_grad:
        return no_grad()  # a decorated function may recurse or run in several threads


def _silent_steps(steps: Any) -> Iterator[Any]:
    """The steps of a generator, each under no_grad, what its caller does between them not."""
    step = functools.partial(next, steps)
    while True:
        try:
            with no_grad():
                item = step()
        except StopIteration as stop:
            return stop.value
        try:
            step = functools.partial(steps.send, (yield item))
        except GeneratorExit:
            with no_grad():
                steps.close()
            raise
        except BaseException as error:
            step = functools.partial(steps.throw, error)


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

    Selections by gate, printed programs and error messages use it.  Free when nothing is recorded.  Where a cell
    gives one name to several values of a step, ``return_gates`` shows the first as ``i``, the next as ``i.1``.

    Raises
    ------
    DTypeError
        ``t`` is no Tensor, or ``label`` no string.
    """
    try:
        node = t._node
    except AttributeError:
        raise DTypeError(
            f"name: a name is given to a Tensor, found {type(t).__name__}; make it one with tg.asarray"
        ) from None
    if label.__class__ is not str and not isinstance(label, str):
        raise DTypeError(f"name: a name is a string, found {label!r}")
    names = _STATE.get().names
    if names is not None:
        names[_free_name(names, t, label)] = t
    if node is None:
        t._more().label = label
    else:
        record, index = (node.record, node.index) if isinstance(node, Output) else (node, 0)
        extra = record.more()
        extra.label = {**(extra.label or {}), index: label}
    return t


def part_name(k: int, count: int) -> str:
    """What part k of ``count`` of a loop's state is called where the body gives it no name."""
    return "state" if count == 1 else f"state{k}"


def note_parts(carry: Sequence[Tensor]) -> None:
    """Note on the tape which part of the state of a loop each of these values is."""
    for k, t in enumerate(carry):
        node = t._node
        if node is not None:
            record, index = (node.record, node.index) if isinstance(node, Output) else (node, 0)
            extra = record.more()
            extra.part = {**(extra.part or {}), index: part_name(k, len(carry))}


def note_selected(states: Iterable[Tensor]) -> None:
    """Note on the tape that lengths chose these values: the new state, or the old one behind a row's end."""
    for t in states:
        if isinstance(t._node, Record):
            t._node.more().selected = True


def _free_name(names: dict[str, Tensor], t: Tensor, label: str) -> str:
    """The name itself, or with the first number that no other value has."""
    free, count = label, 0
    while free in names and names[free] is not t:
        count += 1
        free = f"{label}.{count}"
    return free


@contextmanager
def eager() -> Iterator[None]:
    """Run scans and recurrent layers op by op: the readable path, every step and gate on the tape."""
    with recording(eager=True):
        yield
