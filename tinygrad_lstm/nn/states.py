"""States that a caller gives to a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinygrad_lstm.errors import DTypeError, Error, ShapeError
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.tree import TreeDef, flatten, unflatten

__all__ = ["as_part", "checked_state"]


def as_part(who: str, what: str, value: Any) -> Tensor:
    """A part of a state as a tensor; raises DTypeError where it is no array."""
    try:
        return asarray(value)
    except Error:
        raise DTypeError(f"{who}: {what} is {value!r:.60}, expected an array") from None


def checked_state(who: str, cell: str, given: Any, like: Sequence[Any], treedef: TreeDef) -> Any:
    """A given state in the structure and the shapes of what the cell starts from by itself.

    Raises ShapeError otherwise: a state of another shape would broadcast, and all outputs with it.
    """
    found, found_tree = flatten(given)
    single = treedef.kind == "leaf"
    if single and (len(found) != 1 or found_tree.kind != "leaf"):
        raise ShapeError(
            f"{who}: the state has {len(found)} parts in a {type(given).__name__}, that of {cell} is one array"
        )
    if len(found) != len(like):
        raise ShapeError(f"{who}: the state has {len(found)} parts, that of {cell} has {len(like)}")
    names = ["the state"] if len(found) == 1 else [f"part {k} of the state" for k in range(len(found))]
    parts = [as_part(who, which, leaf) for which, leaf in zip(names, found, strict=True)]
    for which, part, other in zip(names, parts, map(asarray, like), strict=True):
        if part.shape != other.shape:
            raise ShapeError(f"{who}: {which} has shape {part.shape}, expected {other.shape}, which {cell} starts from")
    return unflatten(treedef, parts)
