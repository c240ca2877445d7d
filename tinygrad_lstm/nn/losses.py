"""Loss functions: ``loss(input, target, ..., reduction="mean")``.

``reduction`` is "mean", "sum" or "none" (one value per element or per prediction).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.declare import elementwise
from tinygrad_lstm.errors import ArgumentError, DTypeError, OutOfRangeError, ShapeError
from tinygrad_lstm.kernels import expression as e
from tinygrad_lstm.kernels.softmax import exp_sums, scaled_softmax
from tinygrad_lstm.nn.ctc import ctc_loss
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.trace import TracedTensor

__all__ = [
    "bce_loss", "bce_with_logits", "cross_entropy", "ctc_loss", "huber_loss", "l1_loss", "mse_loss", "nll_loss",
]  # fmt: skip


def _check_reduction(reduction: str, who: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ArgumentError(f"{who}: reduction is 'mean', 'sum' or 'none', found {reduction!r}")


def _reduced(values: Any, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return ops.mean(values) if reduction == "mean" else ops.sum(values)


def _pair(input: Any, target: Any, reduction: str, who: str) -> tuple[Any, Any]:
    """Both as tensors of one shape; a number as target is taken for every element."""
    _check_reduction(reduction, who)
    x, y = asarray(input), asarray(target)
    if y.ndim and x.shape != y.shape:
        raise ShapeError(f"{who}: input of shape {x.shape}, target of shape {y.shape}; reshape one of them")
    return x, y if y.dtype == x.dtype or x.dtype.kind != "f" else y.astype(x.dtype)


def mse_loss(input: Any, target: Any, reduction: str = "mean") -> Tensor:
    """Squared error ``(input - target)^2``; both of one shape.

    >>> from tinygrad_lstm import nn
    >>> nn.mse_loss([1.0, 2.0], [1.0, 4.0]).item()
    2.0
    """
    x, y = _pair(input, target, reduction, "mse_loss")
    return _reduced(ops.square(x - y), reduction)


def l1_loss(input: Any, target: Any, reduction: str = "mean") -> Tensor:
    """Absolute error ``|input - target|``; both of one shape; its derivative at 0 is 0.

    >>> from tinygrad_lstm import nn
    >>> nn.l1_loss([1.0, 2.0], [1.0, 4.0]).item()
    1.0
    """
    x, y = _pair(input, target, reduction, "l1_loss")
    return _reduced(ops.abs(x - y), reduction)


def huber_loss(input: Any, target: Any, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    """Squared near the target, absolute beyond ``delta`` (Huber 1964): ``d^2 / 2`` or ``delta (|d| - delta / 2)``.

    >>> from tinygrad_lstm import nn
    >>> nn.huber_loss([0.5, 4.0], [0.0, 0.0], reduction="none").tolist()
    [0.125, 3.5]
    """
    if not delta > 0:
        raise ArgumentError(f"huber_loss: delta is positive, found {delta}")
    x, y = _pair(input, target, reduction, "huber_loss")
    distance = ops.abs(x - y)
    near = 0.5 * ops.square(x - y)
    return _reduced(ops.where(distance <= delta, near, delta * (distance - 0.5 * delta)), reduction)


# ---------------------------------------------------------------------------- two classes


def _bce_forward(p: np.ndarray, y: Any) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return -(y * np.maximum(np.log(p), -100) + (1 - y) * np.maximum(np.log1p(-p), -100))


_bce = elementwise(
    "binary_cross_entropy",
    lambda p, y: -(y * e.maximum(e.log(p), -100) + (1 - y) * e.maximum(e.log1p(-p), -100)),
    (
        # As in PyTorch: logarithms are not below -100, the slope's denominator not below 1e-12.
        lambda g, p, y: g * (p - y) / ops.maximum((1.0 - p) * p, 1e-12),
        lambda g, p: g * (ops.log(ops.maximum(1.0 - p, 1e-43)) - ops.log(ops.maximum(p, 1e-43))),
    ),
    forward=_bce_forward,
    doc="-(y log p + (1 - y) log(1 - p)), elementwise, logarithms limited to -100.",
)


def _checked_probabilities(p: np.ndarray) -> np.ndarray:
    if p.size and not (p.min() >= 0 and p.max() <= 1):
        bad = p[~((p >= 0) & (p <= 1))][0]
        raise OutOfRangeError(f"bce_loss: input holds {bad}, expected [0, 1]; for logits use bce_with_logits")
    return p


_probabilities: Primitive = Primitive(
    "probabilities", _checked_probabilities, (lambda g: g,), jvp=lambda t, p, out: t[0], shape=lambda p: p,
    register=False, doc="Numbers as they are; raises OutOfRangeError for one outside of [0, 1].",
)  # fmt: skip
_probabilities.only_checks = True


def bce_loss(input: Any, target: Any, reduction: str = "mean") -> Tensor:
    """Cross-entropy of probabilities ``input`` in [0, 1] and targets in [0, 1], of one shape.

    Logarithms are limited to -100, as in PyTorch.  :func:`bce_with_logits` is more accurate.

    Raises
    ------
    OutOfRangeError
        A value of input outside of [0, 1].  Compiled functions check it too; in the body of a scan, which is not left
        for that, such a value gives NaN.

    Examples
    --------
    >>> from tinygrad_lstm import nn
    >>> round(nn.bce_loss([0.5, 0.5], [0.0, 1.0]).item(), 4)
    0.6931
    """
    p, y = _pair(input, target, reduction, "bce_loss")
    if not isinstance(p, TracedTensor):
        _checked_probabilities(p._data)
    elif p._trace.runs:
        p = _probabilities(p)
    return _reduced(_bce(p, y), reduction)


def bce_with_logits(input: Any, target: Any, pos_weight: Any = None, reduction: str = "mean") -> Tensor:
    """Cross-entropy of ``sigmoid(input)`` and targets in [0, 1], exact for logits of any size; both of one shape.

    ``pos_weight`` (broadcast to the shape) multiplies the term of the positive class.

    >>> from tinygrad_lstm import nn
    >>> nn.bce_with_logits([1e4, -1e4], [1.0, 0.0]).item()
    0.0
    """
    x, y = _pair(input, target, reduction, "bce_with_logits")
    if pos_weight is None:
        return _reduced((1.0 - y) * x + ops.softplus(-x), reduction)
    weight = 1.0 + (asarray(pos_weight, x.dtype) - 1.0) * y
    return _reduced((1.0 - y) * x + weight * ops.softplus(-x), reduction)


# ---------------------------------------------------------------------------- many classes


def _checked_targets(
    target: np.ndarray, classes: int, ignore_index: int, who: str = "cross_entropy"
) -> tuple[np.ndarray, np.ndarray | None]:
    """(targets with 0 in place of ignored ones, where they are not ignored or None for everywhere)."""
    if not target.size:
        return target, None
    if target.min() >= 0 and target.max() < classes and not 0 <= ignore_index < classes:
        return target, None
    valid = target != ignore_index
    outside = valid & ((target < 0) | (target >= classes))
    if outside.any():
        raise OutOfRangeError(
            f"{who}: target {target[outside].reshape(-1)[0]} is outside of the classes 0..{classes - 1} "
            f"(ignore_index is {ignore_index})"
        )
    return np.where(valid, target, 0), valid


def _classes_forward(target: np.ndarray, *, classes: int, ignore_index: int) -> np.ndarray:
    return _checked_targets(target, classes, ignore_index, "nll_loss")[0].astype(np.int64)


_classes: Primitive = Primitive(
    "target_classes", _classes_forward, None, differentiable=False, register=False,
    shape=lambda target, classes, ignore_index: Aval(target.shape, np.dtype(np.int64)),
    doc="Classes in 0 .. classes - 1 as int64, 0 for ignored ones; raises OutOfRangeError for any other.",
)  # fmt: skip


def _count(target: np.ndarray, valid: np.ndarray | None) -> int:
    return target.size if valid is None else int(np.count_nonzero(valid))


def _ce_forward(
    x: np.ndarray, target: np.ndarray, *, ignore_index: int, smoothing: float, reduction: str
) -> np.ndarray:  # fmt: skip
    classes = x.shape[-1]
    index, valid = _checked_targets(target, classes, ignore_index)
    if classes == 0 or not index.size:
        return np.zeros(target.shape if reduction == "none" else (), x.dtype)
    rows = x.reshape(-1, classes)
    top, total = exp_sums(rows)
    picked = rows.reshape(-1)[np.arange(0, rows.size, classes) + index.reshape(-1)] - top
    if smoothing:
        picked = (1.0 - smoothing) * picked + smoothing * (np.add.reduce(rows - top[:, None], axis=-1) / classes)
    loss = (np.log(total) - picked).reshape(target.shape)
    if valid is not None:
        loss = np.where(valid, loss, np.zeros((), x.dtype))
    if reduction == "none":
        return loss.astype(x.dtype, copy=False)
    joint = np.add.reduce(loss, axis=None)
    return np.asarray(joint / max(_count(target, valid), 1) if reduction == "mean" else joint, x.dtype)


def _slope_forward(
    g: np.ndarray, x: np.ndarray, target: np.ndarray, *, ignore_index: int, smoothing: float, reduction: str
) -> np.ndarray:
    classes = x.shape[-1]
    index, valid = _checked_targets(target, classes, ignore_index)
    if not x.size:
        return np.zeros_like(x)
    rows = x.reshape(-1, classes)
    scale = np.asarray(g, x.dtype)
    if reduction == "mean":
        scale = scale / max(_count(target, valid), 1)
    if valid is not None:
        scale = np.where(valid, scale, np.zeros((), x.dtype))
    scale = np.broadcast_to(scale, target.shape).reshape(-1).astype(x.dtype, copy=False)
    out = scaled_softmax(rows, scale)
    if smoothing:
        out -= (scale * (smoothing / classes))[:, None]
    places = np.arange(0, out.size, classes) + index.reshape(-1)
    out.reshape(-1)[places] -= scale * (1.0 - smoothing)
    return out.reshape(x.shape)


def _slope_of_x(u: Any, g: Any, x: Any, target: Any, ignore_index: int, smoothing: float, reduction: str) -> Any:
    """The Hessian of the losses times u: ``scale * p * (u - <u, p>)`` (symmetric)."""
    p = ops.softmax(x)
    scale: Any = asarray(ops.not_equal(target, ignore_index)).astype(x.dtype)
    if reduction == "mean":
        scale = scale / ops.maximum(ops.sum(scale), 1.0)
    return ops.expand_dims(scale * g, -1) * (p * (u - ops.sum(u * p, axis=-1, keepdims=True)))


def _slope_of_g(u: Any, g: Any, x: Any, target: Any, ignore_index: int, smoothing: float, reduction: str) -> Any:
    params = {"ignore_index": ignore_index, "smoothing": smoothing, "reduction": reduction}
    return _directional(u, x, target, g.shape, g.dtype, params)


def _directional(t: Any, x: Any, target: Any, shape: Any, dtype: Any, params: Any) -> Any:
    """The derivative of the loss along t."""
    product = t * _slope(asarray(np.ones(shape, dtype)), x, target, **params)
    return ops.sum(product, axis=-1) if params["reduction"] == "none" else ops.reshape(ops.sum(product), shape)


def _plus(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


_slope: Primitive = Primitive(
    "cross_entropy_slope",
    _slope_forward,
    (_slope_of_g, _slope_of_x, None),
    jvp=lambda t, g, x, target, out, **params: _plus(
        None if t[0] is None else _slope(t[0], x, target, **params),
        None if t[1] is None else _slope_of_x(t[1], g, x, target, **params),
    ),
    shape=lambda g, x, target, **params: x,
    doc="The cotangent of logits x (..., C): g (softmax(x) - targets), scaled by the reduction.",
)

_cross_entropy = Primitive(
    "cross_entropy",
    _ce_forward,
    (
        lambda g, x, target, ignore_index, smoothing, reduction: _slope(
            g, x, target, ignore_index=ignore_index, smoothing=smoothing, reduction=reduction
        ),
        None,
    ),
    jvp=lambda t, x, target, out, **params: _directional(t[0], x, target, out.shape, out.dtype, params),
    shape=lambda x, target, **params: Aval(x.shape[:-1] if params["reduction"] == "none" else (), x.dtype),
    doc="Cross-entropy of softmax(x) (..., C) and integer targets (...), reduced.",
)


def _check_classes(x: Tensor, target: Tensor, who: str) -> None:
    if x.dtype.kind != "f":
        raise DTypeError(f"{who}: input has dtype {x.dtype}, expected a floating one")
    if target.dtype.kind not in "iu":
        if x.ndim and target.shape == x.shape:
            raise DTypeError(
                f"{who}: targets are integer classes, found {target.dtype} of the input's shape {x.shape}; of one-hot "
                "rows they are target.argmax(-1), with probabilities the loss is "
                "-(target * ops.log_softmax(logits)).sum(-1).mean()"
            )
        raise DTypeError(f"{who}: targets are integer classes, found {target.dtype}; convert with astype(np.int64)")
    if not x.ndim:
        raise ShapeError(f"{who}: input is 0-d, expected (..., C)")
    if target.shape == x.shape[:-1]:
        return
    if x.ndim > 2 and target.shape == (x.shape[0], *x.shape[2:]):
        raise ShapeError(
            f"{who}: input of shape {x.shape} with target of shape {target.shape} looks like PyTorch's (N, C, ...) "
            "layout; here the classes are on the last axis: ops.moveaxis(input, 1, -1)"
        )
    raise ShapeError(
        f"{who}: target of shape {target.shape} for input of shape {x.shape}; expected {x.shape[:-1]}, "
        "one integer class per row, the classes on the last axis of input"
    )


def _as_targets(target: Any) -> Tensor:
    return asarray(np.asarray(target, np.int64) if isinstance(target, Sequence) and not len(target) else target)


def cross_entropy(
    logits: Any, target: Any, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of ``softmax(logits)`` and integer classes, computed without overflow.

    Parameters
    ----------
    logits : ``(..., C)``, floating dtype
        The classes are on the **last** axis, also for sequences: ``(T, B, C)``.
    target : integers of shape ``logits.shape[:-1]``, in ``0 .. C-1``
    ignore_index : int
        Predictions with this target count for nothing; where all are ignored the loss is 0.
    label_smoothing : float in [0, 1]
        Mixes the target with the uniform distribution (Szegedy et al. 2016).
    reduction : "mean" (over the predictions that count), "sum" or "none" (shape of target)

    Raises
    ------
    OutOfRangeError
        A target outside of the classes.
    ShapeError, DTypeError
        PyTorch's (N, C, T) layout, other shapes that do not fit, or targets that are no integers.

    Examples
    --------
    >>> from tinygrad_lstm import nn
    >>> round(nn.cross_entropy([[0.0, 0.0], [0.0, 0.0]], [0, 1]).item(), 4)
    0.6931
    """
    _check_reduction(reduction, "cross_entropy")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"cross_entropy: label_smoothing lies in [0, 1], found {label_smoothing}")
    x, y = asarray(logits), _as_targets(target)
    _check_classes(x, y, "cross_entropy")
    return _cross_entropy(x, y, ignore_index=int(ignore_index), smoothing=float(label_smoothing), reduction=reduction)


def nll_loss(log_probs: Any, target: Any, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """Minus the log probability of the target class; shapes and errors as :func:`cross_entropy`.

    ``nll_loss(ops.log_softmax(x), t)`` is ``cross_entropy(x, t)``.

    >>> from tinygrad_lstm import nn
    >>> nn.nll_loss([[-1.0, -2.0]], [1]).item()
    2.0
    """
    _check_reduction(reduction, "nll_loss")
    x, y = asarray(log_probs), _as_targets(target)
    _check_classes(x, y, "nll_loss")
    index = _classes(y, classes=x.shape[-1], ignore_index=int(ignore_index))
    valid = ops.not_equal(y, int(ignore_index))
    losses = ops.where(valid, -ops.take_along_axis(x, ops.expand_dims(index, -1), axis=-1)[..., 0], 0.0)
    if reduction != "mean":
        return losses if reduction == "none" else ops.sum(losses)
    count = ops.sum(asarray(valid).astype(np.int64))
    return ops.sum(losses) / ops.maximum(count, 1).astype(x.dtype)
