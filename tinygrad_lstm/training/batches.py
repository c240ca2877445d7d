"""What a batch is, for the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from tinygrad_lstm.errors import ArgumentError

__all__ = ["Batches", "count_targets", "unpack"]


class Batches(Protocol):
    """A sized iterable: one loop over it is an epoch; items are ``(inputs, targets[, lengths])``.

    A loader with ``state_dict`` and ``load_state_dict`` resumes in the middle of an epoch by them;
    any other one has to repeat its order, and the batches already seen are skipped.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


def unpack(batch: Any) -> tuple[Any, Any, np.ndarray | None]:
    """``(inputs, targets, lengths)`` of a batch with two or three parts."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ArgumentError(f"a batch is (inputs, targets) or (inputs, targets, lengths), found {type(batch).__name__}")
    inputs, targets, *rest = batch
    return inputs, targets, (np.asarray(rest[0]) if rest and rest[0] is not None else None)


def count_targets(targets: Any, lengths: np.ndarray | None) -> int:
    """The weight of a batch in a mean over batches: steps that are no padding, or else targets.

    >>> count_targets(np.zeros((5, 3)), np.array([5, 2, 1])), count_targets(np.zeros(3), np.array([5, 2, 1]))
    (8, 3)
    """
    shape = np.shape(targets)
    if lengths is None:
        return int(np.prod(shape, dtype=np.int64))
    steps, batch = int(lengths.max(initial=0)), len(lengths)
    return int(lengths.sum()) if shape[:2] in ((steps, batch), (batch, steps)) else batch
