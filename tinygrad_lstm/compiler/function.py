"""tg.compile: a function recorded once per signature of its arguments, then run as a program."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

from tinygrad_lstm.compiler import report as _report
from tinygrad_lstm.compiler.blame import locked
from tinygrad_lstm.compiler.draws import recorded_again
from tinygrad_lstm.compiler.reach import Reach
from tinygrad_lstm.compiler.reads import is_scalar, scalar_key
from tinygrad_lstm.compiler.recording import CompileWarning, Entry, Recording
from tinygrad_lstm.errors import DTypeError, GraphError
from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.tape import state
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.tree import TreeDef, flatten

__all__ = ["CompileWarning", "Compiled", "compile"]

F = TypeVar("F", bound=Callable[..., Any])

MOST_ENTRIES = 64  # recorded signatures per function
MOST_REACHES = 64  # objects whose contents are remembered per function


class Compiled:
    """What :func:`compile` returns: call it as the function it was made from."""

    __compiled_function__ = True

    def __init__(self, f: Callable[..., Any]) -> None:
        if not callable(f):
            raise DTypeError(f"compile takes a function, found a {type(f).__name__}")
        functools.update_wrapper(self, f, updated=())
        self.__wrapped__ = f
        self._name = getattr(f, "__name__", type(f).__name__)
        self._entries: OrderedDict[Any, Entry] = OrderedDict()
        self._reaches: OrderedDict[int, tuple[Any, Reach]] = OrderedDict()
        self._numbers: dict[Any, int] = {}
        self._lock = threading.Lock()  # of the dictionaries; never held while anything of the user's runs
        self._last: Entry | None = None

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is one of the function, with nothing recorded yet; a method of a Module becomes that of its copy."""
        return type(self), (self.__wrapped__,)

    def __repr__(self) -> str:
        return f"<compiled {self._name}, {len(self._entries)} signatures>"

    def explain(self) -> _report.Report:
        """What became of this function at its last call: equations before and after, fused groups, scans inside."""
        if self._last is None:
            return _report.Report(f"{self._name} was not called yet", notes=["it is recorded at its first call"])
        return self._last.report()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = state()
        if current.eager or current.trace is not None:
            if current.eager:
                _report.publish(_report.op_by_op)
            return self.__wrapped__(*args, **kwargs)
        leaves: list[Any]
        treedef: TreeDef | int
        if kwargs or any(isinstance(arg, (tuple, list, dict)) or arg is None for arg in args):
            leaves, treedef = flatten((args, kwargs), open_modules=False)
        else:
            leaves, treedef = list(args), len(args)  # the common case without the cost of a tree
        tensors: list[Tensor] = []
        parts: list[Any] = []
        others: list[Any] = [self.__wrapped__]
        for k, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
                parts.append((leaf.shape, leaf.dtype))
            elif is_scalar(leaf):
                parts.append(scalar_key(leaf))
            elif hasattr(leaf, "__array__"):
                leaves[k] = tensor = asarray(leaf)
                tensors.append(tensor)
                parts.append((tensor.shape, tensor.dtype))
            else:
                parts.append(None)
                others.append(leaf)
        signature = (treedef, tuple(parts), Primitive.generation)
        reaches = [self._reach(other) for other in others]
        key = (signature, *[reach.number for reach in reaches])
        entry = self._entries.get(key)
        captured = entry.captured(reaches) if entry is not None else None
        if entry is None or captured is None:
            # While somebody differentiates a module its parameters are swapped for variables: wait for that.
            with locked(reaches):
                reaches = [self._reach(other, again=True) for other in others]
                key = (signature, *[reach.number for reach in reaches])
                entry = self._entries.get(key)
                captured = entry.captured(reaches) if entry is not None else None
                if entry is None or captured is None:
                    old, entry = entry, Recording(self._name, self.__wrapped__, leaves, treedef, reaches).entry()
                    if old is not None and old.read:
                        entry.again = old.again + entry.same_as(old)
                        recorded_again(self._name, entry.again)
                    captured = entry.captured(reaches)
            if captured is None:
                raise GraphError(f"{self._name}: a captured tensor was replaced while the function was recorded")
        if entry is not self._last:
            with self._lock:
                self._entries[key] = entry
                self._entries.move_to_end(key)
                while len(self._entries) > MOST_ENTRIES:
                    self._entries.popitem(last=False)
                self._last = entry
        return entry.run(tensors, captured)

    def _reach(self, root: Any, again: bool = False) -> Reach:
        """What can be reached from an object, looked up again only where something changed."""
        known = self._reaches.get(id(root))
        if known is not None and not again and known[0]() is root and known[1].unchanged():
            return known[1]
        reach = Reach(root)
        try:
            reference: Any = weakref.ref(root, functools.partial(_forget, self._reaches, id(root)))
        except TypeError:
            reference = functools.partial(lambda held: held, root)
        with self._lock:
            if len(self._numbers) > 64 * MOST_ENTRIES:  # something changes at every call: start anew
                self._numbers.clear()
                self._entries.clear()
                self._reaches.clear()
            reach.number = self._numbers.setdefault(reach.key, len(self._numbers))
            self._reaches[id(root)] = (reference, reach)
            while len(self._reaches) > MOST_REACHES:
                self._reaches.popitem(last=False)
        return reach


def _forget(reaches: dict[int, Any], identity: int, _: Any) -> None:
    reaches.pop(identity, None)


def compile(f: F) -> F:
    """A function that records ``f`` once per signature of its arguments and then runs it compiled.

    The signature is the structure of the arguments, the shapes and dtypes of arrays and tensors, the values of
    everything else (numbers, strings, functions: pass a number that changes often as an array), and what ``f``
    can reach: the structure of Modules and their mode, numbers and strings that it closes over.  Values of
    Parameters and of tensors that ``f`` closes over are read again at each call.

    The result is differentiable, to any order, with respect to arguments, Parameters and closed-over
    tensors.  Inside of ``tg.eager()`` the plain function runs.  Results equal those of the plain function up to
    rounding.

    Parameters
    ----------
    f : callable
        A pure function of arrays, Tensors, trees (lists, tuples, dicts) and Modules that returns a tree.  Also
        ``tg.value_and_grad(loss)``, a Module, or (as a decorator) a method.

    Returns
    -------
    callable
        As ``f``, with ``explain()``: what was fused and what runs inside.

    Raises
    ------
    TraceError
        At the first call with a signature, where ``f`` asks for values (``if t``, ``float(t)``, ``np.asarray(t)``),
        calls ``backward()``, draws from a generator of this package outside of ops, or writes to objects outside; with
        file and line.

    Warns
    -----
    CompileWarning
        Where so much was recorded that a loop over time was probably unrolled, or where numbers were drawn with
        ``numpy.random`` or ``random`` meanwhile.

    Notes
    -----
    What ``f`` computes with NumPy alone is a constant of the recording, and so is what a function returns anew each
    time: a clock, a generator that ``f`` makes itself.

    Examples
    --------
    >>> import numpy as np
    >>> import tinygrad_lstm as tg
    >>> from tinygrad_lstm import ops
    >>> @tg.compile
    ... def loss(w, x):
    ...     return ops.mean(ops.square(ops.tanh(x @ w)))
    >>> x = np.ones((3, 2), np.float32)
    >>> w = tg.tensor(np.zeros((2, 4), np.float32), requires_grad=True)
    >>> loss(w, x).backward()
    >>> w.grad.shape
    (2, 4)
    """
    return Compiled(f)  # type: ignore[return-value]
