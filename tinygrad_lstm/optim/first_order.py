"""Optimizers that use the gradient alone.  Formulas, keywords and defaults are PyTorch's.

Every rule is one function on scalars: what happens to each element of the parameter p and of its state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.kernels import expression as e
from tinygrad_lstm.optim.base import Optimizer, Rule

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "NAdam", "RMSprop"]


def _pair(betas: Any) -> Any:
    """A list as a tuple; what is no pair is refused by name when the options are checked."""
    return tuple(betas) if isinstance(betas, list) else betas


def _decayed(p: Any, g: Any, decay: Any, on: bool) -> Any:
    """The gradient of the loss plus ``decay / 2 * p^2`` (no product at all without decay: 0 * inf is NaN)."""
    return g + decay * p if on else g


# ---------------------------------------------------------------------------- SGD


@functools.cache
def _sgd(decay_on: bool, momentum_on: bool, nesterov: bool) -> Rule:
    if not momentum_on:
        return lambda p, g, lr, decay: (p - lr * _decayed(p, g, decay, decay_on),)

    def rule(p: Any, velocity: Any, g: Any, lr: Any, decay: Any, momentum: Any, gain: Any) -> tuple[Any, ...]:
        g = _decayed(p, g, decay, decay_on)
        velocity = momentum * velocity + gain * g
        return p - lr * (g + momentum * velocity if nesterov else velocity), velocity

    return rule


class SGD(Optimizer):
    """Stochastic gradient descent (Robbins & Monro 1951) with momentum (Polyak 1964; Sutskever et al. 2013).

    Parameters
    ----------
    params : Module, parameters or groups
    lr, momentum, dampening, weight_decay : float
    nesterov, maximize : bool

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn, optim
    >>> p = nn.Parameter([1.0])
    >>> (p * p).sum().backward()
    >>> optim.SGD([p], lr=0.25).step()
    >>> p.tolist()
    [0.5]
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ArgumentError("SGD: nesterov needs a momentum and no dampening")
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize,
        })  # fmt: skip

    def rule(self, group: dict[str, Any]) -> tuple[Rule, Mapping[str, float]]:
        """``v = momentum v + (1 - dampening) g`` (the first v is g); ``p -= lr v``."""
        moving = group["momentum"] != 0
        return _sgd(group["weight_decay"] != 0, moving, group["nesterov"]), {"momentum_buffer": 0.0} if moving else {}

    def numbers(self, group: dict[str, Any], counters: dict[str, Any], first: bool) -> tuple[float, ...]:
        """The rate, the decay and, with momentum, the momentum and the share of the gradient."""
        momentum = group["momentum"]
        gain = 1.0 if first else 1.0 - group["dampening"]
        return (group["lr"], group["weight_decay"], *((momentum, gain) if momentum != 0 else ()))


# ---------------------------------------------------------------------------- squared-gradient methods


@functools.cache
def _rmsprop(decay_on: bool, momentum_on: bool, centered: bool) -> Rule:
    def rule(*values: Any) -> tuple[Any, ...]:
        states = 1 + momentum_on + centered
        p, square, *more = values[: 1 + states]
        g, lr, decay, alpha, eps, momentum = values[1 + states :]
        g = _decayed(p, g, decay, decay_on)
        square = alpha * square + (1 - alpha) * (g * g)
        spread = square
        new = [square]
        if centered:
            mean = more.pop(0)
            mean = mean + (1 - alpha) * (g - mean)
            spread = square - mean * mean
            new.append(mean)
        move = g / (e.sqrt(spread) + eps)
        if momentum_on:
            move = momentum * more.pop(0) + move
            new.append(move)
        return (p - lr * move, *new)

    return rule


class RMSprop(Optimizer):
    """Gradients divided by the root of their running mean square (Hinton 2012; centered: Graves 2013).

    Parameters
    ----------
    params : Module, parameters or groups
    lr, alpha, eps, weight_decay, momentum : float
    centered, maximize : bool
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0,
        momentum: float = 0.0, centered: bool = False, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {
            "lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum,
            "centered": centered, "maximize": maximize,
        })  # fmt: skip

    def rule(self, group: dict[str, Any]) -> tuple[Rule, Mapping[str, float]]:
        """``s = alpha s + (1 - alpha) g^2``; ``p -= lr g / (sqrt(s) + eps)``."""
        moving, centered = group["momentum"] > 0, bool(group["centered"])
        names = ["square_avg"] + ["grad_avg"] * centered + ["momentum_buffer"] * moving
        return _rmsprop(group["weight_decay"] != 0, moving, centered), dict.fromkeys(names, 0.0)

    def numbers(self, group: dict[str, Any], counters: dict[str, Any], first: bool) -> tuple[float, ...]:
        """The options."""
        return group["lr"], group["weight_decay"], group["alpha"], group["eps"], group["momentum"]


@functools.cache
def _adagrad(decay_on: bool) -> Rule:
    def rule(p: Any, total: Any, g: Any, lr: Any, decay: Any, eps: Any) -> tuple[Any, ...]:
        g = _decayed(p, g, decay, decay_on)
        total = total + g * g
        return p - lr * (g / (e.sqrt(total) + eps)), total

    return rule


class Adagrad(Optimizer):
    """Gradients divided by the root of the sum of their squares (Duchi, Hazan & Singer 2011).

    Parameters
    ----------
    params : Module, parameters or groups
    lr, lr_decay, weight_decay, initial_accumulator_value, eps : float
    maximize : bool
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, lr_decay: float = 0.0, weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0, eps: float = 1e-10, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {
            "lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "eps": eps, "maximize": maximize,
        })  # fmt: skip

    counters = MappingProxyType({"step": 0})

    def rule(self, group: dict[str, Any]) -> tuple[Rule, Mapping[str, float]]:
        """``s += g^2``; ``p -= lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)``."""
        return _adagrad(group["weight_decay"] != 0), {"sum": group["initial_accumulator_value"]}

    def numbers(self, group: dict[str, Any], counters: dict[str, Any], first: bool) -> tuple[float, ...]:
        """The rate of this step and the options."""
        before = counters["step"]
        counters["step"] = before + 1
        return group["lr"] / (1 + before * group["lr_decay"]), group["weight_decay"], group["eps"]


@functools.cache
def _adadelta(decay_on: bool) -> Rule:
    def rule(p: Any, square: Any, moved: Any, g: Any, lr: Any, decay: Any, rho: Any, eps: Any) -> tuple[Any, ...]:
        g = _decayed(p, g, decay, decay_on)
        square = rho * square + (1 - rho) * (g * g)
        delta = e.sqrt(moved + eps) / e.sqrt(square + eps) * g
        return p - lr * delta, square, rho * moved + (1 - rho) * (delta * delta)

    return rule


class Adadelta(Optimizer):
    """Steps in the units of the parameter (Zeiler 2012).

    Parameters
    ----------
    params : Module, parameters or groups
    lr, rho, eps, weight_decay : float
    maximize : bool
    """

    def __init__(
        self, params: Any, lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0, *,
        maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay, "maximize": maximize})

    def rule(self, group: dict[str, Any]) -> tuple[Rule, Mapping[str, float]]:
        """``d = sqrt(u + eps) / sqrt(s + eps) g`` with running means s of g^2 and u of d^2; ``p -= lr d``."""
        return _adadelta(group["weight_decay"] != 0), {"square_avg": 0.0, "acc_delta": 0.0}

    def numbers(self, group: dict[str, Any], counters: dict[str, Any], first: bool) -> tuple[float, ...]:
        """The options."""
        return group["lr"], group["weight_decay"], group["rho"], group["eps"]


# ---------------------------------------------------------------------------- Adam and its relatives


@functools.cache
def _adam(decay_on: bool, decoupled: bool, amsgrad: bool) -> Rule:
    def rule(p: Any, m: Any, v: Any, *rest: Any) -> tuple[Any, ...]:
        peak, (g, lr, decay, beta1, beta2, root, eps) = (rest[0], rest[1:]) if amsgrad else (None, rest)
        if decoupled:
            p = p * decay if decay_on else p  # here decay is 1 - lr * weight_decay
        else:
            g = _decayed(p, g, decay, decay_on)
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * (g * g)
        if amsgrad:
            peak = e.maximum(peak, v)
            return p - lr * (m / (e.sqrt(peak) * (1 / root) + eps)), m, v, peak
        return p - lr * (m / (e.sqrt(v) * (1 / root) + eps)), m, v

    return rule


class Adam(Optimizer):
    """Adaptive moment estimation (Kingma & Ba 2015); amsgrad: Reddi, Kale & Kumar 2018.

    Parameters
    ----------
    params : Module, parameters or groups
    lr : float
    betas : pair of floats
    eps : float
    weight_decay : float
        Added to the gradient; :class:`AdamW` decays the parameter itself.
    amsgrad, maximize : bool

    Examples
    --------
    >>> from tinygrad_lstm import nn, optim
    >>> p = nn.Parameter([1.0])
    >>> (p * p).sum().backward()
    >>> optim.Adam([p], lr=0.5).step()
    >>> round(p.item(), 4)
    0.5
    """

    counters = MappingProxyType({"step": 0})
    decoupled = False

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, amsgrad: bool = False, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {
            "lr": lr, "betas": _pair(betas), "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize,
        })  # fmt: skip

    def rule(self, group: dict[str, Any]) -> tuple[Rule, Mapping[str, float]]:
        """``m, v``: running means of g and g^2, bias-corrected; ``p -= lr m / (sqrt(v) + eps)``."""
        amsgrad = bool(group["amsgrad"])
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
        return _adam(group["weight_decay"] != 0, self.decoupled, amsgrad), dict.fromkeys(names, 0.0)

    def numbers(self, group: dict[str, Any], counters: dict[str, Any], first: bool) -> tuple[float, ...]:
        """The bias-corrected rate, what is decayed or kept, the betas, the root of v's correction, eps."""
        step = counters["step"] = counters["step"] + 1
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        kept = 1 - lr * decay if self.decoupled else decay
        return lr / (1 - beta1**step), kept, beta1, beta2, math.sqrt(1 - beta2**step), group["eps"]


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): ``p *= 1 - lr * weight_decay`` first.

    Parameters as :class:`Adam`, with ``weight_decay=0.01``.
    """

    decoupled = True

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)


@functools.cache
def _nadam(decay_on: bool, decoupled: bool) -> Rule:
    def rule(
        p: Any, m: Any, v: Any, g: Any, by_g: Any, by_m: Any, decay: Any, beta1: Any, beta2: Any, root: Any, eps: Any
    ) -> tuple[Any, ...]:
        if decoupled:
            p = p * decay if decay_on else p
        else:
            g = _decayed(p, g, decay, decay_on)
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * (g * g)
        below = e.sqrt(v) * (1 / root) + eps
        return p - by_g * (g / below) - by_m * (m / below), m, v

    return rule


class NAdam(Optimizer):
    """Adam with Nesterov momentum (Dozat 2016).

    Parameters
    ----------
    params : Module, parameters or groups
    lr, eps, weight_decay, momentum_decay : float
    betas : pair of floats
    decoupled_weight_decay, maximize : bool
    """

    def __init__(
        self, params: Any, lr: float = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, momentum_decay: float = 4e-3, decoupled_weight_decay: bool = False, *,
        maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {
            "lr": lr, "betas": _pair(betas), "eps": eps, "weight_decay": weight_decay, "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize,
        })  # fmt: skip

    counters = MappingProxyType({"step": 0, "mu_product": 1.0})

    def rule(self, group: dict[str, Any]) -> tuple[Rule, Mapping[str, float]]:
        """Adam's moments with the momentum of the next step applied to m and the rest to g."""
        rule = _nadam(group["weight_decay"] != 0, bool(group["decoupled_weight_decay"]))
        return rule, {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def numbers(self, group: dict[str, Any], counters: dict[str, Any], first: bool) -> tuple[float, ...]:
        """The rates of g and of m, what is decayed or kept, the betas, the root of v's correction, eps."""
        step = counters["step"] = counters["step"] + 1
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        mu = beta1 * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * group["momentum_decay"]))
        product = counters["mu_product"] = counters["mu_product"] * mu
        kept = 1 - lr * decay if group["decoupled_weight_decay"] else decay
        by_g, by_m = lr * (1 - mu) / (1 - product), lr * mu_next / (1 - product * mu_next)
        return by_g, by_m, kept, beta1, beta2, math.sqrt(1 - beta2**step), group["eps"]
