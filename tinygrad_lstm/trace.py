"""Recording with data-free tensors: a body is run once on shapes and dtypes, and becomes a Program."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.binding import record_application
from tinygrad_lstm.errors import GraphError, TraceError
from tinygrad_lstm.kernels.expression import Expr
from tinygrad_lstm.operands import as_operands
from tinygrad_lstm.primitive import REGISTRY, Aval, Primitive
from tinygrad_lstm.program import Program, lower
from tinygrad_lstm.record import _STATE, Record, recording
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.tree import TreeDef, flatten, unflatten

__all__ = ["Trace", "Traced", "TracedTensor", "trace"]


class TracedTensor(Tensor):
    """A tensor of which only shape and dtype are known.  Asking for its values raises TraceError."""

    __slots__ = ("_aval", "_trace")

    def __init__(self, aval: Aval, owner: Trace) -> None:
        self._aval = aval
        self._trace = owner
        self._node = None
        self._rg = False
        self._used = False
        self._meta = None
        self._storage = None

    @property
    def _data(self) -> np.ndarray:  # type: ignore[override]
        if self._trace.closed:
            raise GraphError(
                f"a tensor of shape {self.shape} that was made while a scan or compiled body was recorded is used "
                f"outside of it ({_user_line()}); return it from the body instead of storing it"
            )
        asked, line = _asked_by(), _user_line()
        how, advice = _ADVICE.get(asked, ("", "use ops.where instead of if"))
        self._trace.refused = TraceError(
            f"the value of a tensor of shape {self.shape} is needed while the body is being recorded ({line}{how}); "
            f"a recorded body may use shapes and dtypes, not values: {advice}"
        )
        raise self._trace.refused

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of every axis."""
        return self._aval.shape

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype."""
        return np.dtype(self._aval.dtype)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self._aval.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        size = 1
        for n in self._aval.shape:
            size *= n
        return size

    def __len__(self) -> int:
        if not self._aval.shape:
            return super().__len__()
        return self._aval.shape[0]

    def _expose(self) -> None:
        _ = self._data

    def detach(self) -> Tensor:
        """The same value, through which no gradient flows."""
        return REGISTRY["stop_gradient"].bind((self,), {})

    def register_hook(self, hook: Any) -> Any:
        """Refused: what is recorded is a program, and a hook is no part of it."""
        raise _no_hooks("register_hook")

    def retain_grad(self) -> None:
        """Refused, as a hook."""
        raise _no_hooks("retain_grad")

    def __repr__(self) -> str:
        return f"<traced {self._aval}>"


def _no_hooks(name: str) -> TraceError:
    return TraceError(
        f"{name}() while the body is being recorded ({_user_line()}): a recorded body runs without hooks; call it on "
        "what the body returns"
    )


_ON_TENSORS = "compute with ops on the tensor itself (ops.stop_gradient for a value without a gradient)"
_ADVICE = {
    "numpy": (", by .numpy()", _ON_TENSORS),
    "data": (", by .data", _ON_TENSORS),
    "tolist": (", by .tolist()", _ON_TENSORS),
    "__array__": (", as a NumPy array", _ON_TENSORS),
}


def _asked_by() -> str:
    """The method of Tensor that needs the values."""
    frame: Any = sys._getframe(2)
    asked = ""
    while frame is not None and frame.f_globals.get("__name__", "").startswith("tinygrad_lstm."):
        asked, frame = frame.f_code.co_name, frame.f_back
    return asked


def _user_line() -> str:
    """``file:line`` of the first frame outside of this package."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("tinygrad_lstm."):
        frame = frame.f_back
    return "<unknown>" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Trace:
    """The recorder that is in force while a body runs on data-free tensors."""

    runs = False  # whether what is recorded runs as it is, rather than as the body of a loop or to be looked at

    def __init__(self) -> None:
        self.entries: list[tuple[Record, tuple[Any, ...], tuple[Tensor, ...]]] = []
        self.read: list[Tensor] = []  # tensors of which values were asked for: what was recorded depends on those
        self.refused: TraceError | None = None  # the last request for a value
        self.closed = False

    def settle(self) -> None:
        """Raise where a value was asked for: what a body does in an ``except`` is not what it does with the value."""
        if self.refused is not None:
            raise self.refused

    def new(self, aval: Aval, requires_grad: bool = False) -> TracedTensor:
        """A fresh input of the program."""
        tensor = TracedTensor(aval, self)
        tensor._rg = requires_grad and np.dtype(aval.dtype).kind == "f"
        return tensor

    def close(self) -> None:
        """The recording is over: what escaped from it is an error from now on, and nothing refers to itself."""
        self.closed = True
        for record, _, _ in self.entries:
            record.release()
        self.entries = []
        self.read = []
        self.refused = None  # its traceback refers to all that was at work

    def bind(self, prim: Primitive, args: tuple[Any, ...], params: dict[str, Any]) -> Any:
        """Record an application without running it."""
        if any(isinstance(a, Expr) for a in args):
            return prim._symbolic(args, params)
        operands = as_operands(args)
        for a in operands:
            if isinstance(a, TracedTensor) and a._trace.closed:
                _ = a._data  # raises: it escaped from an earlier recording
        avals = [Aval(a.shape, a.dtype) if isinstance(a, Tensor) else a for a in operands]
        out = prim.abstract(avals, params)
        several = not isinstance(out, Aval)
        outputs = tuple(TracedTensor(aval, self) for aval in (out if several else (out,)))
        needs = any(isinstance(a, Tensor) and a._rg for a in operands)
        record = record_application(prim, operands, params, outputs, needs, _STATE.get(), several)
        self.entries.append((record, operands, outputs))
        if not _STATE.get().enabled and prim.name != "stop_gradient":
            # no_grad inside of a body: a Program knows no recording state, so it becomes an equation.
            stopped = [REGISTRY["stop_gradient"].bind((o,), {}) if o.dtype.kind == "f" else o for o in outputs]
            outputs = tuple(stopped)
        return outputs if several else outputs[0]


class Traced:
    """A recorded body: the Program, the tensors that it captured, and the trees of its results."""

    def __init__(
        self, program: Program, captures: list[Tensor], out_tree: TreeDef, read: Sequence[Tensor] = ()
    ) -> None:  # fmt: skip
        self.program = program
        self.captures = captures
        self.out_tree = out_tree
        self.read = read


def trace(body: Callable[..., Any], avals: Sequence[Any], *, flat: bool = False) -> Traced:
    """Run ``body`` once on data-free tensors and return its Program.

    Parameters
    ----------
    body : callable
        Takes one argument per tree in ``avals``; returns a tree of tensors (numbers and arrays count as constants).
    avals : sequence of trees of Aval
    flat : bool
        ``avals`` is one flat list and ``body`` takes the tensors as positional arguments.

    Raises
    ------
    TraceError
        The body asked for a value.
    """
    recorder = Trace()
    inputs: list[Tensor] = []

    def fresh(aval: Any) -> Tensor:
        tensor = recorder.new(aval)
        inputs.append(tensor)
        return tensor

    arguments = []
    for tree in avals:
        if flat:
            arguments.append(fresh(tree))
        else:
            leaves, treedef = _flatten_avals(tree)
            arguments.append(unflatten(treedef, [fresh(leaf) for leaf in leaves]))
    try:
        with recording(enabled=True, tapes=(), trace=recorder):
            result = body(*arguments)
            recorder.settle()
            outputs, out_tree = flatten(result)
            outputs = [asarray(o) if not isinstance(o, Tensor) else o for o in outputs]
        program, captures = lower(recorder.entries, inputs, outputs)
        read = recorder.read
    finally:
        recorder.close()
    return Traced(program, captures, out_tree, read)


def same_values(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same bits: NaN is NaN, and 0.0 is not -0.0."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def depends_on(read: Sequence[Tensor]) -> None:
    """Note for an enclosing recording that what was recorded inside of it depends on these tensors' values."""
    outer = _STATE.get().trace
    if outer is not None:
        outer.read.extend(read)


def _flatten_avals(tree: Any) -> tuple[list[Aval], TreeDef]:
    """Flatten a tree whose leaves are Avals (which are tuples themselves)."""
    boxed: list[Aval] = []

    def box(node: Any) -> Any:
        if isinstance(node, Aval):
            boxed.append(node)
            return object()
        if isinstance(node, dict):
            return {key: box(value) for key, value in node.items()}
        if isinstance(node, tuple) and hasattr(type(node), "_fields"):
            return type(node)(*[box(value) for value in node])
        if isinstance(node, (list, tuple)):
            return type(node)(box(value) for value in node)
        return None if node is None else node

    _, treedef = flatten(box(tree))
    return boxed, treedef
