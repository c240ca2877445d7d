"""What few tensors have: gradients of leaves, hooks; and how a finished cotangent becomes a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_lstm.errors import TraceError
from tinygrad_lstm.kernels.pool import copied
from tinygrad_lstm.ownership import is_sole, is_sole_array, settle
from tinygrad_lstm.record import Record
from tinygrad_lstm.replays import known_replay
from tinygrad_lstm.tape import replay, run_hooks

if TYPE_CHECKING:
    from tinygrad_lstm.tensor import Tensor

__all__ = ["HookHandle", "Meta", "accumulate_grad", "fill_gradients", "no_gradients", "take_gradient"]


class Meta:
    """What few tensors have: a gradient, hooks, a name."""

    __slots__ = ("grad", "hooks", "label")

    def __init__(self) -> None:
        self.grad: np.ndarray | None = None
        self.hooks: list[Any] | None = None
        self.label: str | None = None


class HookHandle:
    """What :meth:`Tensor.register_hook` returns; removing a hook twice is no error."""

    __slots__ = ("_hook", "_hooks")

    def __init__(self, hooks: list[Any], hook: Any) -> None:
        self._hooks, self._hook = hooks, hook

    def remove(self) -> None:
        """Take the hook off; it is not called again."""
        if self._hook in self._hooks:
            self._hooks.remove(self._hook)

    __call__ = remove


def no_gradients(what: str) -> TraceError:
    """What recorded code cannot do: it runs once as Python, and its gradients are not there yet."""
    return TraceError(
        f"{what} while the body is being recorded; what is recorded runs only once as Python: read, set and clear "
        "gradients outside of it"
    )


def accumulate_grad(leaf: Tensor, cotangent: Tensor) -> None:
    """Add a finished cotangent to ``leaf.grad``, in an array that nothing else refers to."""
    if not leaf._rg:
        return
    sole = is_sole(cotangent)
    _accumulate(leaf, cotangent._data, sole)


def take_gradient(leaf: Tensor, array: np.ndarray) -> None:
    """:func:`accumulate_grad` for the array that a known replay found."""
    if not leaf._rg:  # linked for a Tape only
        return
    meta = leaf._meta or leaf._more()
    if meta.grad is None and is_sole_array(array) and _fits(array, leaf):
        meta.grad = array
    else:
        _accumulate(leaf, array, False)


def _accumulate(leaf: Tensor, array: np.ndarray, sole: bool) -> None:
    meta = leaf._meta or leaf._more()
    if meta.grad is not None:
        meta.grad = meta.grad + array  # a new array: the user may have kept the old one
    elif sole and _fits(array, leaf):
        meta.grad = array
    else:
        meta.grad = copied(array, leaf.dtype)


def _fits(array: np.ndarray, leaf: Tensor) -> bool:
    """Whether an array may become the gradient of a leaf as it is."""
    flags = array.flags
    return array.dtype is leaf._data.dtype and flags.c_contiguous and flags.writeable


# The replay divides by zero where a derivative is infinite (sqrt at 0): that is its value, not an accident.
@np.errstate(divide="ignore", invalid="ignore")
def fill_gradients(target: Tensor, seed: Tensor, free: bool) -> None:
    """Replay the tape behind ``target`` from this cotangent, and add what is found to the gradients of the leaves."""
    node = target._node
    if node.__class__ is Record and known_replay(node, seed._data, free, take_gradient):
        return
    retained: list[tuple[Any, Tensor]] = []
    found: dict[Any, Tensor] = replay([(node or target, seed)], free=free, retained=retained)
    for leaf in found:
        meta = leaf._meta
        if meta is not None and meta.hooks:
            found[leaf] = run_hooks(meta.hooks, found[leaf], "a leaf")
    for reference, cotangent in retained:
        if (computed := reference()) is not None:
            accumulate_grad(computed, cotangent)
    del retained
    settle(found, accumulate_grad)
