"""What a batch is, for the training loop, and which of its steps are real."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from tinygrad_lstm.data.sequences import step_mask
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.nn import Module
from tinygrad_lstm.tensor import to_array
from tinygrad_lstm.tree import flatten, tree_map

__all__ = ["Batches", "Unpacked", "has_padding", "real_steps", "unpack"]


class Batches(Protocol):
    """A sized iterable: one loop over it is an epoch; items are ``(inputs, targets[, lengths])``.

    A loader with ``state_dict`` and ``load_state_dict`` resumes in the middle of an epoch by them;
    any other one has to repeat its order, and the batches already seen are skipped.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Unpacked(NamedTuple):
    """The parts of a batch, and what its lengths say about the targets."""

    inputs: Any
    targets: Any
    lengths: np.ndarray | None
    mask: np.ndarray | None
    """bool, the first two axes of targets per step: which are no padding; None where none is, or one per sequence."""
    weight: int
    """In a mean over batches: real steps of targets per step, else sequences; without lengths, targets."""


def unpack(batch: Any, model: Module | None = None) -> Unpacked:
    """The parts of ``(inputs, targets)`` or ``(inputs, targets, lengths)``.

    Targets are per step where the batch (a :class:`~tinygrad_lstm.data.Batch`) says so, or where they are laid out
    like the inputs.  As many steps as sequences leave the layout open: then it is that of the model's layers.

    >>> unpack((np.zeros((2, 3, 4)), np.zeros((2, 3)), [2, 1, 1])).mask.tolist()
    [[True, True, True], [True, False, False]]
    >>> unpack((np.zeros((2, 3, 4)), np.zeros(3), [2, 1, 1])).weight
    3
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ArgumentError(
            f"a batch is (inputs, targets) or (inputs, targets, lengths), found {type(batch).__name__}; of a single "
            "batch make a list, [(inputs, targets)]"
        )
    inputs, targets, *rest = batch
    leaves = flatten(targets)[0]
    if isinstance(targets, (list, tuple)) and leaves and not any(np.ndim(leaf) for leaf in leaves):
        targets = to_array(targets)
        leaves = [targets]
    shapes = [np.shape(leaf) for leaf in leaves] or [()]
    if not rest or rest[0] is None:
        return Unpacked(inputs, targets, None, None, int(np.prod(shapes[0], dtype=np.int64)))
    lengths = to_array(rest[0])
    n = lengths.size
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise DTypeError(
            f"a batch's lengths are integers, one per sequence, found {lengths.dtype} of shape {lengths.shape}"
        )
    steps, first = _layout(inputs, lengths)
    if first is None:
        said = getattr(batch, "batch_first", None)
        first = any(getattr(m, "batch_first", False) for m in model.modules()) if said is None and model else bool(said)
    found = [shape[:2] for shape in shapes]
    # (B, T, ...) beside inputs (T, B, ...) are no steps but a vector for each sequence; the other way round they are.
    first = first and (n, steps) in found
    if getattr(batch, "per_step", None) is False or (not first and (steps, n) not in found):
        return Unpacked(inputs, targets, lengths, None, n)
    mask = step_mask(lengths, steps, first) if has_padding(inputs, lengths) else None
    return Unpacked(inputs, targets, lengths, mask, int(lengths.sum()))


def has_padding(inputs: Any, lengths: np.ndarray) -> bool:
    """Whether a sequence of the batch ends before its last step."""
    return lengths.size > 0 and bool(lengths.min() < _layout(inputs, lengths)[0])


def _layout(inputs: Any, lengths: np.ndarray) -> tuple[int, bool | None]:
    """The steps of a batch, padding included, and whether the batch is its first axis; None where both fit."""
    n, longest = lengths.size, int(lengths.max(initial=0))
    shapes = [shape for leaf in flatten(inputs)[0] if len(shape := np.shape(leaf)[:2]) == 2]
    for shape in shapes:
        if n in shape:
            time_first, batch_first = shape[1] == n and shape[0] >= longest, shape[0] == n and shape[1] >= longest
            if time_first or batch_first:
                return (shape[1] if batch_first else shape[0]), (None if time_first and batch_first else batch_first)
    if shapes and n:
        raise ShapeError(
            f"a batch has {n} lengths of up to {longest} steps, but inputs of {' x '.join(map(str, shapes[0]))} (steps "
            "and sequences, or the other way round); expected one length per sequence, at most the number of steps"
        )
    return longest, None


def real_steps(output: Any, batch: Unpacked) -> tuple[Any, Any]:
    """The model's output and the targets for the loss: without the padding, ``(N, ...)``, if they are per step."""
    mask = batch.mask
    if mask is None:
        return output, batch.targets
    found = [np.shape(leaf) for leaf in flatten(output)[0]]
    if not any(shape[:2] == mask.shape or shape[:1] == (mask.size,) for shape in found):
        raise ShapeError(
            f"Trainer: sequences of different lengths with targets per step, {mask.shape} of them, but the model's "
            f"output has shape {', '.join(map(str, found))}; expected ({mask.shape[0]}, {mask.shape[1]}, ...), so that "
            "the padding can be left out of the loss"
        )

    def select(leaf: Any) -> Any:
        shape = np.shape(leaf)
        if shape[:2] == mask.shape:
            return leaf[mask]
        return leaf[mask.reshape(-1)] if shape[:1] == (mask.size,) else leaf  # the model joined the two axes

    return tree_map(select, output), tree_map(select, batch.targets)
