"""Limits on gradients before a step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygrad_lstm.checks import check_number
from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.kernels.multi import multi_tensor, sums_of_squares
from tinygrad_lstm.optim.base import as_parameters

__all__ = ["clip_grad_norm", "clip_grad_value"]


def _scaled(g: Any, factor: Any) -> tuple[Any, ...]:
    return (g * factor,)


_scale = multi_tensor(_scaled, 1, 0, 1)


def _norm(g: np.ndarray, kind: float) -> float:
    flat = g.reshape(-1)
    if not flat.size:
        return 0.0
    if kind == math.inf:
        return float(np.abs(flat).max())
    return float(np.sum(np.abs(flat) ** kind)) ** (1.0 / kind)


def clip_grad_norm(params: Any, max_norm: float, norm_type: float = 2.0) -> float:
    """Scale all gradients so that their joint norm is at most ``max_norm`` (Pascanu, Mikolov & Bengio 2013).

    Parameters
    ----------
    params : Module, Tensor or iterable of Parameters
        Those without a gradient are skipped.
    max_norm : float
    norm_type : float
        ``math.inf`` for the largest absolute value.

    Returns
    -------
    float
        The norm before clipping; NaN or inf where a gradient is (the gradients are then no longer finite either).

    Examples
    --------
    >>> from tinygrad_lstm import nn, optim
    >>> p = nn.Parameter([3.0, 4.0])
    >>> (p * p * 0.5).sum().backward()
    >>> optim.clip_grad_norm([p], 1.0)
    5.0
    >>> p.grad.round(3).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    for label, number in (("max_norm", max_norm), ("norm_type", norm_type)):
        check_number(f"clip_grad_norm: {label}", number)
    if not max_norm >= 0 or not norm_type > 0:
        raise ArgumentError(f"clip_grad_norm: max_norm={max_norm}, norm_type={norm_type}; both are positive")
    owned = [(p, p.grad) for p in as_parameters(params, "clip_grad_norm")]
    owners = [p for p, g in owned if g is not None]
    grads = [g for _, g in owned if g is not None]
    kind = float(norm_type)
    with np.errstate(all="ignore"):
        if kind == 2.0:
            total = math.sqrt(float(np.add.reduce(sums_of_squares(grads))))
        else:
            total = _norm(np.asarray([_norm(g, kind) for g in grads]), kind)
        factor = max_norm / (total + 1e-6)
        if factor >= 1.0:  # not if it is NaN
            return total
        for p, g in zip(owners, grads, strict=True):
            if not g.flags.writeable:
                p.grad = g * factor
        _scale([g for g in grads if g.flags.writeable], (factor,))
    return total


def clip_grad_value(params: Any, clip_value: float) -> None:
    """Limit every element of every gradient to ``[-clip_value, clip_value]``, in place.

    >>> from tinygrad_lstm import nn, optim
    >>> p = nn.Parameter([3.0, -4.0])
    >>> (p * p * 0.5).sum().backward()
    >>> optim.clip_grad_value([p], 1.0)
    >>> p.grad.tolist()
    [1.0, -1.0]
    """
    check_number("clip_grad_value: clip_value", clip_value)
    if not clip_value >= 0:
        raise ArgumentError(f"clip_grad_value: clip_value is not negative, found {clip_value}")
    for p in as_parameters(params, "clip_grad_value"):
        if p.grad is not None:
            p.grad = np.clip(p.grad, -clip_value, clip_value, out=p.grad if p.grad.flags.writeable else None)
