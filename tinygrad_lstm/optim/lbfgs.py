"""Limited-memory BFGS (Liu & Nocedal 1989), with PyTorch's parameters and stopping rules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.optim.base import Optimizer, as_float, check_closure, flat_gradients

__all__ = ["LBFGS"]


class LBFGS(Optimizer):
    """Quasi-Newton steps from the last ``history_size`` changes of parameters and gradient.

    ``step(closure)``: the closure clears the gradients, computes the loss, calls ``backward`` and returns the
    loss; it is called several times per step.  One group of parameters only.

    Parameters
    ----------
    params : Module or parameters
    lr : float
    max_iter, max_eval : int
        Iterations and evaluations per step (1.25 * max_iter by default).
    tolerance_grad, tolerance_change : float
    history_size : int
    line_search_fn : None or "strong_wolfe" (Nocedal & Wright 2006, algorithms 3.5 and 3.6)

    Examples
    --------
    >>> from tinygrad_lstm import nn, optim
    >>> p = nn.Parameter([3.0, -2.0])
    >>> optimizer = optim.LBFGS([p], line_search_fn="strong_wolfe")
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = ((p - 1.0) ** 2).sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> [round(v, 4) for v in p.tolist()]
    [1.0, 1.0]
    """

    def __init__(
        self, params: Any, lr: float = 1.0, max_iter: int = 20, max_eval: int | None = None,
        tolerance_grad: float = 1e-7, tolerance_change: float = 1e-9, history_size: int = 100,
        line_search_fn: str | None = None,
    ) -> None:  # fmt: skip
        if line_search_fn not in (None, "strong_wolfe"):
            raise ArgumentError(f"LBFGS: line_search_fn is None or 'strong_wolfe', found {line_search_fn!r}")
        super().__init__(params, {
            "lr": lr, "max_iter": max_iter, "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad, "tolerance_change": tolerance_change, "history_size": history_size,
            "line_search_fn": line_search_fn,
        })  # fmt: skip
        if len(self.param_groups) != 1:
            raise ArgumentError(f"LBFGS takes one group of parameters, found {len(self.param_groups)}")

    # ------------------------------------------------------------------ the parameters as one vector

    def _get(self) -> np.ndarray:
        return np.concatenate([p._data.reshape(-1) for p in self.param_groups[0]["params"]])

    def _set(self, values: np.ndarray) -> None:
        start = 0
        for p in self.param_groups[0]["params"]:
            p._replace(values[start : start + p.size].reshape(p.shape).astype(p.dtype))
            start += p.size

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Up to ``max_iter`` iterations; returns the loss at the start."""
        if closure is None:
            raise ArgumentError("LBFGS.step needs a closure that computes the loss and its gradients and returns it")
        check_closure(self, closure)
        run = closure
        group = self.param_groups[0]
        params = group["params"]
        own = self.state.setdefault(id(params[0]), {})
        first = run()
        loss, g = as_float("LBFGS.step: what the closure returns", first), flat_gradients(params)
        evaluations, iterations = 1, 0
        if np.abs(g).max(initial=0.0) <= group["tolerance_grad"]:
            return first
        d, previous, t = own.get("d"), own.get("prev_flat_grad"), own.get("t", group["lr"])
        steps, changes = own.get("old_stps", []), own.get("old_dirs", [])
        scale, count = own.get("H_diag", 1.0), own.get("n_iter", 0)

        def along(x: np.ndarray, direction: np.ndarray, rate: float) -> tuple[float, np.ndarray]:
            self._set(x + rate * direction)
            return float(run()), flat_gradients(params)

        while iterations < group["max_iter"]:
            iterations, count = iterations + 1, count + 1
            if count == 1 or d is None:
                d, scale, steps, changes = -g, 1.0, [], []
            else:
                change, step = g - previous, d * t
                curvature = float(change @ step)
                if curvature > 1e-10:
                    if len(changes) == group["history_size"]:
                        del changes[0], steps[0]
                    changes.append(change)
                    steps.append(step)
                    scale = curvature / float(change @ change)
                d = _direction(g, changes, steps, scale)
            previous, loss_before = g.copy(), loss
            t = min(1.0, 1.0 / float(np.abs(g).sum())) * group["lr"] if count == 1 else group["lr"]
            slope = float(g @ d)
            if slope > -group["tolerance_change"]:
                break
            used = 1
            if group["line_search_fn"] == "strong_wolfe":
                x = self._get()
                evaluate = functools.partial(along, x, d)
                most = group["max_eval"] - evaluations
                loss, g, t, used = strong_wolfe(evaluate, t, d, loss, g, slope, most=most)
                self._set(x + t * d)
            else:
                self._set(self._get() + t * d)
                used = 0
                if iterations != group["max_iter"]:
                    loss, g = float(run()), flat_gradients(params)
                    used = 1
            evaluations += used
            if (
                iterations == group["max_iter"]
                or evaluations >= group["max_eval"]
                or np.abs(g).max() <= group["tolerance_grad"]
                or np.abs(d * t).max() <= group["tolerance_change"]
                or abs(loss - loss_before) < group["tolerance_change"]
            ):
                break
        own.update(d=d, t=float(t), old_dirs=changes, old_stps=steps)
        own.update(H_diag=scale, prev_flat_grad=previous, n_iter=count)
        return first

    def load_state_dict(self, state: Any) -> None:
        """Go on from what :meth:`state_dict` returned, for the same parameters in the same order."""
        groups, states = self._checked_state(state)
        own = states.get("0", states.get(0, {}))
        size = sum(p.size for p in self.param_groups[0]["params"])
        if own and np.shape(own["d"]) != (size,):
            raise ArgumentError(f"LBFGS.load_state_dict: directions of shape {np.shape(own['d'])}, expected ({size},)")
        super().load_state_dict({"param_groups": groups, "state": {}})
        if own:
            kept = {k: [np.array(v) for v in x] if isinstance(x, list) else x for k, x in own.items()}
            self.state = {id(self.param_groups[0]["params"][0]): kept}


def _direction(g: np.ndarray, changes: list[np.ndarray], steps: list[np.ndarray], scale: float) -> np.ndarray:
    """The two-loop recursion: minus the approximate inverse Hessian times g."""
    q = -g
    inverse = [1.0 / float(y @ s) for y, s in zip(changes, steps, strict=True)]
    weights = [0.0] * len(changes)
    for k in range(len(changes) - 1, -1, -1):
        weights[k] = float(steps[k] @ q) * inverse[k]
        q = q - weights[k] * changes[k]
    q = q * scale
    for k in range(len(changes)):
        q = q + steps[k] * (weights[k] - float(changes[k] @ q) * inverse[k])
    return q


def _cubic(
    x1: float, f1: float, s1: float, x2: float, f2: float, s2: float, bounds: tuple[float, float] | None = None
) -> float:  # fmt: skip
    """The minimum of the cubic through two points with their slopes, kept within bounds."""
    low, high = bounds if bounds is not None else (min(x1, x2), max(x1, x2))
    d1 = s1 + s2 - 3 * (f1 - f2) / (x1 - x2)
    square = d1 * d1 - s1 * s2
    if square < 0:
        return (low + high) / 2.0
    d2 = square**0.5
    if x1 <= x2:
        best = x2 - (x2 - x1) * ((s2 + d2 - d1) / (s2 - s1 + 2 * d2))
    else:
        best = x1 - (x1 - x2) * ((s1 + d2 - d1) / (s1 - s2 + 2 * d2))
    return min(max(best, low), high)


def strong_wolfe(
    evaluate: Callable[[float], tuple[float, np.ndarray]], t: float, d: np.ndarray, f: float, g: np.ndarray,
    slope: float, c1: float = 1e-4, c2: float = 0.9, tolerance: float = 1e-9, most: int = 25,
) -> tuple[float, np.ndarray, float, int]:  # fmt: skip
    """A rate along d that satisfies the strong Wolfe conditions: (loss, gradient, rate, evaluations)."""
    width = float(np.abs(d).max())
    f_new, g_new = evaluate(t)
    used, s_new = 1, float(g_new @ d)
    t_old, f_old, g_old, s_old = 0.0, f, g, slope
    done, k = False, 0
    bracket: list[Any] = []
    while k < most:
        if f_new > f + c1 * t * slope or (k > 1 and f_new >= f_old):
            bracket = [(t_old, f_old, g_old, s_old), (t, f_new, g_new, s_new)]
            break
        if abs(s_new) <= -c2 * slope:
            bracket, done = [(t, f_new, g_new, s_new)], True
            break
        if s_new >= 0:
            bracket = [(t_old, f_old, g_old, s_old), (t, f_new, g_new, s_new)]
            break
        low, high = t + 0.01 * (t - t_old), t * 10
        kept = t
        t = _cubic(t_old, f_old, s_old, t, f_new, s_new, (low, high))
        t_old, f_old, g_old, s_old = kept, f_new, g_new, s_new
        f_new, g_new = evaluate(t)
        used, s_new, k = used + 1, float(g_new @ d), k + 1
    if not bracket:
        bracket = [(0.0, f, g, slope), (t, f_new, g_new, s_new)]
    stuck = False
    lo, hi = (0, -1) if bracket[0][1] <= bracket[-1][1] else (1, 0)
    while not done and k < most:
        (t1, f1, _, s1), (t2, f2, _, s2) = bracket
        if abs(t2 - t1) * width < tolerance:
            break
        t = _cubic(t1, f1, s1, t2, f2, s2)
        left, right = min(t1, t2), max(t1, t2)
        margin = 0.1 * (right - left)
        if min(right - t, t - left) < margin:
            if stuck or t >= right or t <= left:
                t = right - margin if abs(t - right) < abs(t - left) else left + margin
                stuck = False
            else:
                stuck = True
        else:
            stuck = False
        f_new, g_new = evaluate(t)
        used, s_new, k = used + 1, float(g_new @ d), k + 1
        if f_new > f + c1 * t * slope or f_new >= bracket[lo][1]:
            bracket[hi] = (t, f_new, g_new, s_new)
            lo, hi = (0, 1) if bracket[0][1] <= bracket[1][1] else (1, 0)
        else:
            if abs(s_new) <= -c2 * slope:
                done = True
            elif s_new * (bracket[hi][0] - bracket[lo][0]) >= 0:
                bracket[hi] = bracket[lo]
            bracket[lo] = (t, f_new, g_new, s_new)
    t, f_new, g_new, _ = bracket[lo] if len(bracket) > 1 else bracket[0]
    return f_new, g_new, t, used
