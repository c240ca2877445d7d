"""Tensor: an ndarray and its place on a tape.

Operators and methods are installed by :mod:`tinygrad_lstm.ops`, which stands above this file.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_lstm.dtypes import as_dtype, check_differentiable, is_weak
from tinygrad_lstm.errors import DTypeError, GraphError, ShapeError
from tinygrad_lstm.leaves import HookHandle, Meta, fill_gradients, no_gradients
from tinygrad_lstm.record import _STATE, SILENT, state
from tinygrad_lstm.storage import Storage, assign, watch_output
from tinygrad_lstm.tape import Output, Record

__all__ = ["Tensor", "as_like", "asarray", "read", "tensor"]


class Tensor:
    """An n-dimensional array that remembers how it was made.

    Make one with :func:`tensor` (copies) or :func:`asarray` (aliases).  Arithmetic, slicing and the methods
    follow NumPy; ``np.asarray(t)`` is the array.
    """

    __slots__ = ("__weakref__", "_data", "_meta", "_node", "_rg", "_storage", "_used")
    __array_priority__ = 1000.0

    _data: np.ndarray
    _meta: Meta | None
    _node: Record | Output | None
    _rg: bool
    _storage: Storage | None
    _used: bool

    if TYPE_CHECKING:
        # Operators and methods are installed by ops.methods; the type checker sees them here.
        def _binary(self, other: Any) -> Tensor: ...

        __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _binary
        __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __and__ = __or__ = __xor__ = __rand__ = __ror__ = __rxor__ = (
            _binary
        )
        __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = _binary
        __lt__ = __le__ = __gt__ = __ge__ = _binary

        def __eq__(self, other: Any) -> Tensor: ...  # type: ignore[override]
        def __ne__(self, other: Any) -> Tensor: ...  # type: ignore[override]
        def __neg__(self) -> Tensor: ...
        def __pos__(self) -> Tensor: ...
        def __abs__(self) -> Tensor: ...
        def __invert__(self) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def __iter__(self) -> Iterator[Tensor]: ...
        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, data: np.ndarray, requires_grad: bool = False) -> None:
        self._data = data
        self._node = None
        self._rg = requires_grad
        self._used = False  # some record has saved this value
        self._meta = None
        self._storage = None

    # ------------------------------------------------------------------ the value

    @property
    def data(self) -> np.ndarray:
        """The ndarray itself.  Writing to it after an op saved it is noticed by ``backward``."""
        self._expose()
        return self._read()

    @data.setter
    def data(self, value: Any) -> None:
        array = value._data if isinstance(value, Tensor) else read(value)
        if array.shape != self._data.shape:
            raise ShapeError(f"data of shape {array.shape} for a tensor of shape {self._data.shape}; make a new tensor")
        if array.dtype != self._data.dtype:
            if not np.can_cast(array.dtype, self._data.dtype, "same_kind"):
                raise DTypeError(f"data of dtype {array.dtype} for a tensor of dtype {self._data.dtype}; convert first")
            array = array.astype(self._data.dtype)
        self._replace(array)
        self._store().exposed = True  # the caller may hold the array

    def numpy(self) -> np.ndarray:
        """The ndarray itself (shared, not a copy), as :attr:`data`."""
        return self.data

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy or (dtype is not None and np.dtype(dtype) != self._data.dtype):
            if copy is False:
                raise DTypeError(f"a tensor of dtype {self._data.dtype} cannot become {dtype} without a copy")
            return np.array(self._read(), dtype=dtype)
        return self.data

    def _read(self) -> np.ndarray:
        """The array, for code outside of ops: what is being recorded holds for these values only."""
        recorder = _STATE.get().trace
        if recorder is not None:
            recorder.read.append(self)
        return self._data

    def _expose(self) -> None:
        self._store().expose()

    def _bump(self) -> None:
        """Note that the value was replaced or written to."""
        self._store().bump()

    def _replace(self, array: np.ndarray) -> None:
        """Put another array in place of the value; the one way to do so after the tensor was made."""
        storage = self._store()
        self._data = storage.memory = array
        storage.exposed, storage.fingerprint = False, None
        storage.bump()

    def _store(self) -> Storage:
        if self._storage is None:
            base = self._data.base
            self._storage = Storage(base if isinstance(base, np.ndarray) else self._data, self._used)
            watch_output(self._node, self._storage)
        return self._storage

    def _more(self) -> Meta:
        if self._meta is None:
            self._meta = Meta()
        return self._meta

    @property
    def version(self) -> int:
        """How often the value was replaced through ``data`` or by an optimizer."""
        return 0 if self._storage is None else self._storage.version

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of every axis."""
        return self._data.shape

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype."""
        return self._data.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._data.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self._data.size

    def item(self) -> Any:
        """The value of a tensor with one element, as a Python number."""
        if self._data.size != 1:
            raise ShapeError(f"item() needs exactly one element, found shape {self.shape}; use tolist() or an index")
        return self._read().item()

    def _number(self, who: str) -> Any:
        if self._data.size != 1:
            raise ShapeError(
                f"{who} needs exactly one element, found shape {self.shape}; in place of functions of Python's math, "
                "which take numbers, use those of ops"
            )
        return self.item()

    def tolist(self) -> Any:
        """The values as nested Python lists (a number for a 0-d tensor)."""
        return self._read().tolist()

    def __len__(self) -> int:
        if self._data.ndim == 0:
            raise DTypeError("len() of a 0-d tensor; it holds one number, use item()")
        return self._data.shape[0]

    def __bool__(self) -> bool:
        if self._data.size != 1:
            raise ShapeError(f"the truth value of a tensor of shape {self.shape} is ambiguous; reduce it first")
        return bool(self._read().item())

    def __float__(self) -> float:
        return float(self._number("float()"))

    def __int__(self) -> int:
        return int(self._number("int()"))

    def __index__(self) -> int:
        if self._data.dtype.kind not in "iu" or self._data.ndim:
            raise DTypeError(f"only an integer 0-d tensor can be an index, found {self.dtype} of shape {self.shape}")
        return int(self._read())

    __hash__ = object.__hash__  # identity: == compares values

    def __format__(self, spec: str) -> str:
        return format(self._data.item(), spec) if self._data.size == 1 and spec else str(self)

    def __repr__(self) -> str:
        body = np.array2string(self._data, separator=", ", prefix="tensor(", threshold=100)
        dtype = "" if self.dtype == np.float32 else f", dtype={self.dtype}"
        return f"tensor({body}{dtype}{', requires_grad=True' if self._rg else ''})"

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._rg or self._node is not None or self._used or (self._storage is not None and self._storage.used):
            raise GraphError(
                f"in-place write to a tensor of shape {self.shape} that is on a tape; write "
                "ops.where(mask, new, t) or ops.scatter_add(t, index, value), or assign to t.data outside of the graph"
            )
        if isinstance(value, Tensor) and value._rg and state().enabled:
            raise GraphError(
                "writing a tensor that requires a gradient into another one loses the gradient; build the result with "
                "ops.stack, ops.concatenate, ops.where or ops.scatter_add, or write value.detach()"
            )
        if isinstance(value, Tensor):
            value = value._data
        elif not isinstance(value, (int, float)):
            value = to_array(value, self.dtype)
        assign(self._data, index, value)
        self._bump()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What copy.deepcopy and pickle ask: the value of a leaf; there is no copy of a graph."""
        self._read()
        if self._node is None:
            return super().__reduce_ex__(protocol)
        if self._rg:
            raise GraphError(
                f"a computed tensor of shape {self.shape} that requires a gradient cannot be deep-copied or pickled: "
                "its graph cannot; use detach() for the values, or tg.save"
            )
        return Tensor, (self._data,)

    def __copy__(self) -> Tensor:
        self._read()
        found: Any = object.__reduce_ex__(self, 4)
        make, args, state = found[:3]
        twin: Tensor = make(*args)
        for fields in state if isinstance(state, tuple) else (state,):
            for name, value in (fields or {}).items():
                setattr(twin, name, value)
        return twin

    # ------------------------------------------------------------------ the place on the tape

    @property
    def requires_grad(self) -> bool:
        """Whether ``backward`` computes a gradient for this value."""
        return self._rg

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if self._node is not None and self._rg and not value:
            raise GraphError("requires_grad of a computed tensor cannot be unset; use detach()")
        if value:
            check_differentiable(self._data.dtype)
        self._rg = bool(value)

    @property
    def is_leaf(self) -> bool:
        """True where no record made this tensor."""
        return self._node is None

    @property
    def grad(self) -> np.ndarray | None:
        """The accumulated gradient: an ndarray of this tensor's shape and dtype, or None."""
        if _STATE.get().trace is not None:
            raise no_gradients("reads .grad")
        return None if self._meta is None else self._meta.grad

    @grad.setter
    def grad(self, value: Any) -> None:
        if _STATE.get().trace is not None:
            raise no_gradients("sets .grad")
        if value is None:
            if self._meta is not None:
                self._meta.grad = None
            return
        array = to_array(value, self.dtype)
        if array.shape != self.shape:
            raise ShapeError(f"grad of shape {array.shape} for a tensor of shape {self.shape}")
        self._more().grad = array

    def zero_grad(self) -> None:
        """Forget the gradient (sets it to None)."""
        self.grad = None

    def detach(self) -> Tensor:
        """The same values (shared), outside of any graph."""
        if _STATE.get().trace is not None:  # another array may stand here when the recording runs
            from tinygrad_lstm.pullback import REGISTRY  # stands above this module

            found: Tensor = REGISTRY["stop_gradient"].bind((self,), {})
            return found
        out = Tensor(self._data)
        out._storage = self._store()
        return out

    def retain_grad(self) -> None:
        """Let ``backward`` fill ``grad`` of this computed tensor too, as it does for leaves."""
        if not self._rg:
            raise GraphError("retain_grad() on a tensor that does not require a gradient")
        if self._node is None:
            return
        # Weak: the record must not keep its own output alive.
        record, index = (self._node.record, self._node.index) if isinstance(self._node, Output) else (self._node, 0)
        extra = record.more()
        extra.retained = {**(extra.retained or {}), index: weakref.ref(self)}

    def register_hook(self, hook: Any) -> HookHandle:
        """Call ``hook(gradient)`` when the gradient of this value is complete; a returned value replaces it.

        Returns a :class:`HookHandle`: ``handle.remove()`` (or ``handle()``) removes the hook.
        """
        if not self._rg:
            raise GraphError("register_hook() on a tensor that does not require a gradient")
        if not callable(hook):
            raise DTypeError(f"register_hook() takes a function of the gradient, found {hook!r}")
        if self._node is None:
            meta = self._more()
            meta.hooks = hooks = meta.hooks or []
        else:
            record, index = (self._node.record, self._node.index) if isinstance(self._node, Output) else (self._node, 0)
            extra = record.more()
            extra.hooks = extra.hooks or {}
            hooks = extra.hooks.setdefault(index, [])
        hooks.append(hook)
        return HookHandle(hooks, hook)

    def backward(self, grad: Any = None, retain_graph: bool = False, **unknown: Any) -> None:
        """Replay the tape behind this tensor in reverse and accumulate into ``grad`` of every leaf.

        Parameters
        ----------
        grad : array or Tensor of this shape, optional
            The cotangent; may be left out for a scalar.
        retain_graph : bool
            Keep what the records saved, so that a second call can go through them.

        Raises
        ------
        GraphError
            No graph, a graph freed by an earlier call, or a saved value that was changed in place.

        Examples
        --------
        >>> import tinygrad_lstm as tg
        >>> x = tg.tensor([1.0, 2.0], requires_grad=True)
        >>> (x * x).sum().backward()
        >>> x.grad.tolist()
        [2.0, 4.0]
        """
        if unknown:
            raise DTypeError(
                f"backward takes grad (the cotangent) and retain_graph, found {', '.join(unknown)}; gradients that are "
                "to be differentiated again are those of tg.grad and tg.hvp"
            )
        if not self._rg:
            raise GraphError(
                "backward() on a tensor that does not require a gradient: none of the values it was computed from has "
                "requires_grad=True (or it was computed under no_grad)"
            )
        seed = seed_cotangent(self, grad, "backward")
        # No context manager of our own: in its __exit__ an interrupt could come before the state is restored.
        token = _STATE.set(SILENT)
        try:
            fill_gradients(self, seed, not retain_graph)
        finally:
            _STATE.reset(token)


def seed_cotangent(target: Tensor, cotangent: Any, who: str) -> Tensor:
    """The cotangent to start from, checked against the target; ones for a scalar."""
    if not isinstance(target, Tensor):
        raise DTypeError(f"{who} needs a Tensor to differentiate, found {type(target).__name__}")
    if cotangent is None:
        shape, dtype = target.shape, target.dtype
        if not shape:
            return Tensor(_one(dtype).copy())
        if target.size != 1:
            argument = {"backward": "grad", "Tape.gradient": "cotangent"}.get(who, "")
            raise ShapeError(
                f"{who} without a cotangent needs a scalar, found shape {target.shape}; reduce it (sum, mean) or pass "
                f"{f'{argument}=, an array of that shape' if argument else 'one'}"
            )
        return Tensor(np.ones(shape, dtype))
    given = as_like(cotangent, target.dtype)
    if given.shape != target.shape:
        raise ShapeError(f"{who}: cotangent of shape {given.shape} for an output of shape {target.shape}")
    return given


@functools.cache
def _one(dtype: np.dtype) -> np.ndarray:
    return np.ones((), dtype)


# ---------------------------------------------------------------------------- making tensors


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(item) for item in value)
    return isinstance(value, Tensor)


def read(value: Any) -> np.ndarray:
    """Numbers, nested lists of them, or what else NumPy reads, in the dtype that NumPy gives."""
    if _holds_tensors(value):
        raise DTypeError(
            f"a {type(value).__name__} of tensors where one array is expected: join them with ops.stack or "
            "ops.concatenate, which keep the graph, or pick one (recurrent layers return a pair (output, state))"
        )
    try:
        return np.asarray(value)
    except ValueError:
        raise ShapeError(
            f"nested lists of unequal lengths cannot become an array: {value!r:.80}; fill them up to one length"
        ) from None


def to_array(value: Any, dtype: Any = None, copy: bool = False) -> np.ndarray:
    """Anything array-like as an ndarray; Python floats become float32, everything else keeps its dtype."""
    if isinstance(value, Tensor):
        array = value._read()
    elif isinstance(value, np.ndarray):
        array = value
    else:
        array = read(value)
        if dtype is None and is_weak(array, value):
            array = array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise DTypeError(
            f"a tensor holds real numbers, integers or booleans; found dtype {array.dtype} from {type(value).__name__}"
        )
    if dtype is not None and array.dtype != as_dtype(dtype):
        return array.astype(dtype)
    return np.array(array) if copy else array


def tensor(a: Any, dtype: Any = None, requires_grad: bool = False) -> Tensor:
    """A tensor with a copy of ``a``.

    Parameters
    ----------
    a : array, Tensor, number, or nested lists of numbers
        Arrays keep their dtype; Python floats become float32, Python ints stay integers.
    dtype : NumPy dtype, optional
    requires_grad : bool
        Floating dtypes only; otherwise :class:`~tinygrad_lstm.DTypeError`.

    Examples
    --------
    >>> import tinygrad_lstm as tg
    >>> tg.tensor([1.0, 2.0]).dtype
    dtype('float32')
    """
    out = Tensor(to_array(a, dtype, copy=True))
    if requires_grad:
        check_differentiable(out.dtype)
        out._rg = True
    return out


def asarray(a: Any, dtype: Any = None) -> Tensor:
    """A tensor that shares memory with the array ``a`` where that is possible; a Tensor is returned as it is.

    In another dtype it is ``a.astype(dtype)``, which keeps the graph.
    """
    if isinstance(a, Tensor):
        return a if dtype is None or a.dtype == as_dtype(dtype) else a.astype(dtype)
    out = Tensor(to_array(a, dtype))
    out._store().exposed = True
    return out


def as_like(value: Any, dtype: Any) -> Tensor:
    """A tensor of a known dtype: a Tensor is converted (and keeps its graph), all else is read in that dtype.

    Python floats have double precision until then: 0.1 in float64 is not 0.1 in float32.
    """
    return asarray(value, dtype)
