"""Connectionist temporal classification (Graves, Fernandez, Gomez & Schmidhuber 2006)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.errors import ArgumentError, DTypeError, OutOfRangeError, ShapeError
from tinygrad_lstm.ops.lengths import check_lengths
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.tensor import Tensor, asarray, read

__all__ = ["ctc_loss"]


def _path_forward(labels: np.ndarray, sizes: np.ndarray, *, classes: int, blank: int) -> np.ndarray:
    inside = np.arange(labels.shape[1]) < sizes[:, None]
    outside = inside & ((labels < 0) | (labels >= classes) | (labels == blank))
    if outside.any():
        bad = labels[outside][0]
        raise OutOfRangeError(f"ctc_loss: target {bad}; targets lie in 0..{classes - 1} and are not blank={blank}")
    path = np.full((len(labels), 2 * labels.shape[1] + 1), blank, np.int64)
    path[:, 1::2] = np.where(inside, labels, blank)
    return path


_path: Primitive = Primitive(
    "ctc_path", _path_forward, None, differentiable=False, register=False,
    shape=lambda labels, sizes, classes, blank: Aval((labels.shape[0], 2 * labels.shape[1] + 1), np.dtype(np.int64)),
    doc="Targets (B, S) with a blank around each, (B, 2 S + 1); blanks past their sizes.",
)  # fmt: skip


def ctc_loss(
    log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, blank: int = 0, reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:  # fmt: skip
    """Minus the log probability of all alignments of the targets with the input: the forward recursion in ops.

    Parameters
    ----------
    log_probs : ``(T, B, C)``
        From ``ops.log_softmax``.
    targets : integers ``(B, S)``
        Classes other than ``blank``; what stands past a target's length is not looked at.
    input_lengths, target_lengths : B ints
    blank : int
    reduction : "mean" (each loss divided by its target's length, then averaged), "sum" or "none"
    zero_infinity : bool
        0, without a gradient, for targets that do not fit their input (infinite loss otherwise).

    Raises
    ------
    OutOfRangeError
        A target outside of the classes.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn, ops
    >>> log_probs = ops.log_softmax(np.zeros((4, 1, 3), np.float32))
    >>> round(nn.ctc_loss(log_probs, [[1, 2]], [4], [2], reduction="sum").item(), 4)
    1.6864
    """
    if reduction not in ("mean", "sum", "none"):
        raise ArgumentError(f"ctc_loss: reduction is 'mean', 'sum' or 'none', found {reduction!r}")
    x, labels = asarray(log_probs), targets if isinstance(targets, Tensor) else asarray(read(targets))
    if x.ndim != 3 or labels.ndim != 2 or labels.shape[0] != x.shape[1]:
        raise ShapeError(
            f"ctc_loss: log_probs of shape {x.shape}, expected (T, B, C); targets {labels.shape}, expected (B, S)"
        )
    if labels.dtype.kind not in "iu":
        if labels.size:
            raise DTypeError(f"ctc_loss: targets are integer classes, found {labels.dtype}")
        labels = labels.astype(np.int64)
    steps, batch, classes = x.shape
    if not 0 <= blank < classes:
        raise OutOfRangeError(f"ctc_loss: blank={blank} is outside of the classes 0..{classes - 1}")
    frames = check_lengths(input_lengths, steps, batch, "ctc_loss (input_lengths)")
    sizes = asarray(check_lengths(target_lengths, labels.shape[1], batch, "ctc_loss (target_lengths)"))
    # Blanks around every label: blank, l1, blank, l2, ..., blank.
    path = _path(labels, sizes, classes=classes, blank=int(blank))
    first = np.zeros((batch, min(2, path.shape[1])), bool)
    skips = ops.concatenate(
        [first, ops.where(ops.equal(path[:, 2:], blank), False, ops.not_equal(path[:, 2:], path[:, :-2]))], axis=1
    )
    minus_inf = np.asarray(-np.inf, x.dtype)
    edge = np.full((batch, 2), minus_inf)
    start = np.full(path.shape, minus_inf)
    start[:, 0] = 0.0

    def body(alpha: Any, emitted: Any) -> Any:
        shifted = ops.concatenate([edge, alpha], axis=1)
        ways = ops.stack([alpha, shifted[:, 1:-1], ops.where(skips, shifted[:, :-2], minus_inf)])
        return ops.logsumexp(ways, axis=0) + emitted, None

    emitted = ops.take_along_axis(x, ops.broadcast_to(path, (steps, *path.shape)), axis=-1)
    alpha, _ = ops.scan(body, start, emitted, lengths=frames)
    places = np.arange(path.shape[1])
    last = 2 * ops.expand_dims(sizes, 1)
    ends = ops.where(ops.equal(places, last), True, ops.equal(places, last - 1))
    losses = -ops.logsumexp(ops.where(ends, alpha, minus_inf), axis=-1)
    if zero_infinity:
        losses = ops.where(ops.isfinite(losses), losses, np.zeros((), x.dtype))
    if reduction == "none":
        return losses
    if reduction == "sum":
        return ops.sum(losses)
    return ops.mean(losses / ops.maximum(sizes, 1).astype(x.dtype))
