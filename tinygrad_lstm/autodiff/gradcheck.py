"""gradcheck: analytic gradients against central differences, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_lstm.autodiff.forward import jvp
from tinygrad_lstm.autodiff.reverse import check_callable, grad, opened, vjp
from tinygrad_lstm.errors import ArgumentError, DTypeError, GradcheckError, TraceError, UnsupportedError
from tinygrad_lstm.primitive import OpaqueError
from tinygrad_lstm.tape import no_grad
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.tree import flatten, leaf_paths, unflatten

__all__ = ["gradcheck"]


def gradcheck(
    f: Callable[..., Any], *args: Any, order: int = 1, rtol: float = 1e-5, atol: float = 1e-7, step: float = 1e-6
) -> bool:
    """Compare the gradients of ``f`` with central differences; True, or an error that says where they differ.

    Then ``jvp`` is compared with the gradients: a primitive may declare one of its own.

    Parameters
    ----------
    f : callable
        Of trees of arrays; returns a tree of Tensors.  The check is of a random projection of all its outputs.
    args : arrays, Tensors or trees
        Floating leaves are checked, after conversion to float64; others are passed on.  Of a Module its parameters are
        checked; it should be a float64 one, so that what it computes beside them is.
    order : 1 or 2
        2 checks the gradient of the gradient as well (projected at random).
    rtol, atol : float
        Accepted is ``|analytic - numeric| <= atol + rtol * max(|analytic|, |numeric|)``.
    step : float
        Of the central difference, relative to ``max(1, |x|)``.

    Raises
    ------
    GradcheckError
        Names the argument, the index, the analytic and the numeric value.

    Examples
    --------
    >>> import tinygrad_lstm as tg
    >>> from tinygrad_lstm import ops
    >>> tg.gradcheck(lambda x: ops.tanh(x) * x, [0.3, -1.2], order=2)
    True
    """
    check_callable(f, "gradcheck")
    if order not in (1, 2):
        raise ArgumentError(f"gradcheck: order is 1 or 2, found {order}")
    f, args = opened(f, args)
    args = tuple(asarray(a) if isinstance(a, (list, tuple)) and _plain(a) else a for a in args)
    leaves, treedef = flatten(args)
    arrays = [_to_float64(leaf) for leaf in leaves]
    names = [_name(path) for path in leaf_paths(args)]
    chosen = [k for k, a in enumerate(arrays) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    if not chosen:
        raise DTypeError("gradcheck: no argument holds floating numbers; there is nothing to check")
    rng = np.random.default_rng(0)

    def call(*floats: Any) -> list[Tensor]:
        filled = list(arrays)
        for k, value in zip(chosen, floats, strict=True):
            filled[k] = asarray(value)
        outs, _ = flatten(f(*unflatten(treedef, filled)))
        return [o for o in outs if isinstance(o, Tensor) and o.dtype.kind == "f"]

    points = [arrays[k] for k in chosen]
    with no_grad():
        weights = [np.asarray(rng.uniform(0.5, 1.5, o.shape) * rng.choice([-1.0, 1.0], o.shape)) for o in call(*points)]
    if not weights:
        raise DTypeError("gradcheck: the function returned no floating Tensor")

    def projected(*floats: Any) -> Tensor:
        terms = [(o * w).sum() for o, w in zip(call(*floats), weights, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    labels = [names[k] for k in chosen]
    gradients = _compare(projected, points, labels, rtol, atol, step, "gradient")
    _compare_forward(projected, points, labels, gradients, rtol, atol, rng)
    if order == 2:
        directions = [rng.standard_normal(p.shape) for p in points]

        def slope(*floats: Any) -> Tensor:
            grads = grad(projected, tuple(range(len(floats))))(*floats)
            terms = [(g * d).sum() for g, d in zip(grads, directions, strict=True)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            return total

        _compare(slope, points, labels, rtol, atol, step, "second derivative")
    return True


def _plain(value: Any) -> bool:
    return all(isinstance(v, (int, float)) or (isinstance(v, (list, tuple)) and _plain(v)) for v in value)


def _name(path: str) -> str:
    number, _, rest = path[1:].partition("]")
    return f"argument {number}{rest}"


def _to_float64(leaf: Any) -> Any:
    if isinstance(leaf, (Tensor, np.ndarray, float, np.floating)):
        array = asarray(leaf)._data
        return np.array(array, np.float64) if array.dtype.kind == "f" else array
    return leaf


def _compare(
    f: Callable[..., Tensor],
    points: list[np.ndarray],
    labels: list[str],
    rtol: float,
    atol: float,
    step: float,
    what: str,
) -> list[np.ndarray]:
    out, pullback = vjp(f, *points)
    analytic = [g._data for g in pullback(np.ones(out.shape))]
    for k, (point, label) in enumerate(zip(points, labels, strict=True)):
        if analytic[k].shape != point.shape:
            raise GradcheckError(f"{label}: {what} of shape {analytic[k].shape}, expected {point.shape}")
        for index in np.ndindex(point.shape):
            h = step * max(1.0, abs(float(point[index])))
            values = []
            for sign in (1.0, -1.0):
                moved = [p.copy() for p in points]
                moved[k][index] += sign * h
                with no_grad() if what == "gradient" else _nothing():
                    values.append(f(*moved).item())
            numeric = (values[0] - values[1]) / (2 * h)
            found = float(analytic[k][index])
            if not abs(found - numeric) <= atol + rtol * max(abs(found), abs(numeric)):
                allowed = atol + rtol * max(abs(found), abs(numeric))
                raise GradcheckError(
                    f"{label}, index {index}: analytic {what} {found:.10g}, numeric {numeric:.10g} "
                    f"(difference {abs(found - numeric):.3g}, allowed {allowed:.3g})"
                )
    return analytic


def _compare_forward(
    f: Callable[..., Tensor],
    points: list[np.ndarray],
    labels: list[str],
    gradients: list[np.ndarray],
    rtol: float,
    atol: float,
    rng: np.random.Generator,
) -> None:
    """jvp against the gradients: along one direction, and along every axis where that differs."""

    def differ(found: float, expected: float, scale: float) -> bool:
        return not abs(found - expected) <= atol + rtol * scale and not math.isnan(found) and not math.isnan(expected)

    direction = [rng.standard_normal(p.shape) for p in points]
    shares = [g * d for g, d in zip(gradients, direction, strict=True)]
    scale = sum(float(np.abs(s).sum()) for s in shares)
    try:
        slope = jvp(f, tuple(points), tuple(direction))[1].item()
    except (OpaqueError, TraceError, UnsupportedError):  # something in f has no forward mode
        return
    if not differ(slope, sum(float(s.sum()) for s in shares), scale):
        return
    for k, (point, label) in enumerate(zip(points, labels, strict=True)):
        for index in np.ndindex(point.shape):
            along = [np.zeros(p.shape) for p in points]
            along[k][index] = 1.0
            found, expected = jvp(f, tuple(points), tuple(along))[1].item(), float(gradients[k][index])
            if differ(found, expected, max(abs(found), abs(expected))):
                raise GradcheckError(
                    f"{label}, index {index}: derivative by jvp {found:.10g}, numeric and by vjp {expected:.10g}"
                )


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...
