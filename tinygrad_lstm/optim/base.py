"""What all optimizers share: parameter groups, their state, and one way to run an update rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tinygrad_lstm.calls import SaysWhatItTakes
from tinygrad_lstm.checks import is_number
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.hints import did_you_mean
from tinygrad_lstm.kernels.multi import multi_tensor
from tinygrad_lstm.tape import state as recording_state
from tinygrad_lstm.tensor import Tensor

__all__ = ["Optimizer", "Rule", "as_parameters"]

Rule = Callable[..., tuple[Any, ...]]


@functools.lru_cache(maxsize=256)
def _ascending(rule: Rule, position: int) -> Rule:
    """The rule with the sign of its gradient, the argument at ``position``, turned round."""
    return lambda *x: rule(*x[:position], -x[position], *x[position + 1 :])


# Options that are numbers in every optimizer; one of a user may have others, of any kind.
_NUMBERS = frozenset({"alpha", "dampening", "eps", "lr", "lr_decay", "momentum", "rho", "weight_decay"})


def _listed(params: Any, who: str) -> list[Any]:
    try:
        return list(params)
    except TypeError:
        raise DTypeError(f"{who}: parameters are a Module or a list of Tensors, found {params!r:.60}") from None


def as_parameters(params: Any, who: str) -> list[Tensor]:
    """The parameters of a module, or those in an iterable (also with their names); one Tensor is one parameter."""
    if isinstance(params, Tensor):
        return [params]
    found = [
        p[1] if isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) else p
        for p in _listed(params.parameters() if hasattr(params, "parameters") else params, who)
    ]
    for p in found:
        if not isinstance(p, Tensor):
            raise DTypeError(f"{who}: parameters are Tensors, found {type(p).__name__}")
    return found


def check_closure(optimizer: Optimizer, closure: Any) -> None:
    """Raise where ``step`` was given something else than a function."""
    if closure is not None and not callable(closure):
        raise DTypeError(f"{type(optimizer).__name__}.step takes a closure or nothing, found {closure!r:.60}")


def as_float(what: str, value: Any) -> float:
    """A loss or metric as a float; DTypeError where it is none."""
    if not is_number(value) and getattr(value, "size", 0) != 1:
        raise DTypeError(f"{what} is a number or a Tensor with one element, found {value!r:.60}")
    return float(value.item() if hasattr(value, "item") else value)


class Optimizer(SaysWhatItTakes):
    """Base class: ``step()`` changes the parameters in place by their ``.grad``.

    Parameters
    ----------
    params : Module, iterable of Parameters (or of pairs of a name and one), or iterable of dicts
        A dict is a group: ``{"params": ..., "lr": ...}`` with options of its own.
    defaults : dict
        The options of groups that do not set them.

    Attributes
    ----------
    param_groups : list of dicts
        The options of every group, which may be changed between steps, and its "params".
    state : dict
        Parameter -> dict of arrays and numbers.

    Examples
    --------
    An optimizer of one's own says what happens to one element, in :meth:`rule`, and which numbers that takes, in
    :meth:`numbers`; all tensors of a group are then updated in one native call.  Steps by the sign of a running mean
    (Bernstein et al. 2018):

    >>> from tinygrad_lstm import nn, optim
    >>> from tinygrad_lstm.kernels import expression as e
    >>> def signum(p, m, g, lr, beta):
    ...     m = beta * m + (1 - beta) * g
    ...     return p - lr * e.sign(m), m
    >>> class Signum(optim.Optimizer):
    ...     def rule(self, group):
    ...         return signum, {"mean": 0.0}
    ...     def numbers(self, group, counters, first):
    ...         return group["lr"], group["beta"]
    >>> p = nn.Parameter([1.0, 2.0])
    >>> (p * p).sum().backward()
    >>> Signum([p], {"lr": 0.25, "beta": 0.9}).step()
    >>> p.tolist()
    [0.75, 1.75]
    """

    #: The numbers that are kept for every parameter, with their values before its first step.
    counters: Mapping[str, int | float] = {}

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[int, dict[str, Any]] = {}  # by id of the parameter, which the groups keep alive
        self._check(defaults)
        who = type(self).__name__
        if isinstance(params, Tensor):
            raise DTypeError(f"{who}: one Tensor given; pass a Module or a list of parameters")
        single = hasattr(params, "parameters") or isinstance(params, Mapping)
        groups: list[Any] = [params] if single else _listed(params, who)
        if groups and all(isinstance(group, Mapping) for group in groups):
            for group in groups:
                self.add_param_group(dict(group))
        else:
            self.add_param_group({"params": groups[0] if single else groups})

    @property
    def lr(self) -> Any:
        """The learning rate of the first group; setting it sets that of all groups."""
        if "lr" not in self.defaults:
            raise AttributeError(f"{type(self).__name__} has no learning rate")
        return self.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: Any) -> None:
        if "lr" not in self.defaults:
            raise ArgumentError(f"{type(self).__name__} has no option lr; it has {sorted(self.defaults)}")
        self._check({"lr": value})
        for group in self.param_groups:
            group["lr"] = value

    def _check(self, options: Mapping[str, Any]) -> None:
        """Raise unless the options are in their ranges."""
        who = type(self).__name__
        for key, value in options.items():
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            bounded = key in ("betas", "alpha", "rho")
            if key in _NUMBERS and not all(is_number(number) for number in numbers):
                raise DTypeError(f"{who}: {key} is a number, found {value!r}")
            if key == "betas" and not (len(numbers) == 2 and all(is_number(number) for number in numbers)):
                raise DTypeError(f"{who}: betas is a pair of numbers, found {value!r}")
            for number in numbers:
                if isinstance(number, bool) or not isinstance(number, (int, float, np.number)):
                    continue
                if not number >= 0 and key not in ("dampening", "tolerance_grad"):
                    raise ArgumentError(f"{who}: {key} is not negative, found {value}")
                if bounded and not number < 1 and not (key == "rho" and number == 1):
                    raise ArgumentError(f"{who}: {key} is below 1, found {value}")

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add parameters with options of their own: ``{"params": ..., "lr": ...}``."""
        who = type(self).__name__
        unknown = set(group) - set(self.defaults) - {"params", "initial_lr"}
        if unknown or "params" not in group:
            hints = (did_you_mean(name, [*self.defaults, "params"]) for name in sorted(unknown))
            raise ArgumentError(
                f"{who}: a group has 'params' and options of {sorted(self.defaults)}, found {sorted(group)}"
                f"{next(hints, '')}"
            )
        self._check(group)
        params = as_parameters(group["params"], who)
        if not params:
            raise ArgumentError(f"{who}: no parameters to optimize (an empty list or a module without any)")
        known = {id(p) for other in self.param_groups for p in other["params"]}
        for p in params:
            if p._node is not None or p.dtype.kind != "f":
                raise ArgumentError(f"{who}: a computed or integer tensor of shape {p.shape} is no parameter")
            if id(p) in known:
                raise ArgumentError(f"{who}: a parameter of shape {p.shape} is given twice")
            known.add(id(p))
        self.param_groups.append({**self.defaults, **group, "params": params})

    # ------------------------------------------------------------------ stepping

    def zero_grad(self) -> None:
        """Set the gradients of all parameters to None."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns ``closure()`` if one is given (run first)."""
        check_closure(self, closure)
        loss = None if closure is None else closure()
        if recording_state().trace is not None:
            raise ArgumentError(f"{type(self).__name__}.step() inside of a recorded function; call it outside")
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        rule, start = self.rule(group)
        if group.get("maximize"):
            rule = _ascending(rule, 1 + len(start))
        names, counters, states = list(start), list(self.counters.items()), self.state
        # Parameters that need the same numbers (as a rule all of a group) are updated together.
        batches: dict[Any, _Batch] = {}
        for p in group["params"]:
            gradient = p.grad
            if gradient is None:
                continue
            data = p._data
            if not data.flags.carray:  # contiguous, aligned and writeable
                p._replace(np.array(data, order="C"))
                data = p._data
            own = states.get(id(p))
            if own is None:
                own = states[id(p)] = {}
            missing = [name for name in names if own.get(name) is None]
            for name in missing:
                own[name] = np.full(data.shape, start[name], data.dtype)
            key = (data.dtype, not missing, *[own.get(name, before) for name, before in counters])
            batch = batches.get(key)
            if batch is None:
                kept = {name: own.get(name, before) for name, before in counters}
                numbers = tuple(self.numbers(group, kept, bool(missing)))
                batch = batches[key] = _Batch(numbers, kept)
            own.update(batch.counters)
            batch.params.append(p)
            batch.arrays += [data, *[own[name] for name in names], gradient]
            batch.elements += data.size
        for batch in batches.values():
            kernel = multi_tensor(rule, 1 + len(names), 1, len(batch.numbers))
            kernel(batch.arrays, batch.numbers, batch.elements)
            for p in batch.params:
                p._bump()

    def rule(self, group: dict[str, Any]) -> tuple[Rule, Mapping[str, float]]:
        """What a step does to one element, and the arrays of the state with their values before the first step.

        The rule takes the elements of the parameter, of the arrays in their order, and of the gradient, then the
        numbers that :meth:`numbers` returns, all of them symbolic scalars, and returns the new elements of the
        parameter and of the arrays.  It should be the same object every time for the same options.
        """
        raise NotImplementedError

    def numbers(self, group: dict[str, Any], counters: dict[str, Any], first: bool) -> tuple[float, ...]:
        """The numbers that the rule takes in this step.

        ``counters`` holds what :attr:`counters` names, as the last step left it, and is brought up to date in place;
        ``first`` tells that an array of the state has just been made.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ the state as a tree

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters, as a tree of arrays (copies), numbers, strings, lists and dicts.

        Parameters are numbered through all groups.
        """
        numbers: dict[int, int] = {}
        groups = []
        for group in self.param_groups:
            for p in group["params"]:
                numbers[id(p)] = len(numbers)
            options = {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k != "params"}
            groups.append({**options, "params": [numbers[id(p)] for p in group["params"]]})
        state = {
            str(number): {key: _copied(value) for key, value in self.state[identity].items()}
            for identity, number in numbers.items()
            if identity in self.state
        }
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, for the same parameters in the same order.

        Raises ArgumentError or ShapeError, with nothing changed, where the groups or shapes differ.
        """
        who = f"{type(self).__name__}.load_state_dict"
        groups, states = self._checked_state(state)
        loaded: dict[int, dict[str, Any]] = {}
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                own = states.get(str(number), states.get(number))
                if own is not None:
                    self._check_counters(own, p, who)
                    what = f"{who}: {{}} of parameter {number}"
                    loaded[id(p)] = {key: _fitted(value, p, what.format(key)) for key, value in own.items()}
                    for key in self.counters.keys() & loaded[id(p)].keys():
                        # Other libraries keep them as arrays with one element.
                        loaded[id(p)][key] = np.asarray(loaded[id(p)][key]).item()
                number += 1
        for group, given in zip(self.param_groups, groups, strict=True):
            for key, value in given.items():
                if key != "params":
                    group[key] = tuple(value) if isinstance(value, list) else value
        self.state = loaded

    def _checked_state(self, state: Any) -> tuple[list[Mapping[str, Any]], dict[Any, Mapping[str, Any]]]:
        """The groups of a state, and what it keeps for each parameter; raises unless it is one of such an optimizer."""
        who = f"{type(self).__name__}.load_state_dict"
        parts = (state.get("param_groups"), state.get("state")) if isinstance(state, Mapping) else (None, None)
        if not (isinstance(parts[0], (list, tuple)) and isinstance(parts[1], Mapping)):
            found = f"a dict with {sorted(map(str, state))}" if isinstance(state, Mapping) else type(state).__name__
            raise ArgumentError(
                f"{who}: this is no state of an optimizer: found {found}, expected the list 'param_groups' and the "
                "dict 'state', as state_dict() returns them"
            )
        groups, states = list(parts[0]), dict(parts[1])
        for number, own in states.items():
            if not isinstance(own, Mapping):
                raise ArgumentError(f"{who}: the state of parameter {number} is a dict, found {own!r:.60}")
        for group in groups:
            if not isinstance(group, Mapping) or "params" not in group:
                raise ArgumentError(f"{who}: a group is a dict with 'params', found {group!r:.60}")
            # A flag that is missing is one that another release, or library, does not have.
            needed = [key for key, value in self.defaults.items() if value is not None and value is not False]
            if not group.keys() >= set(needed):
                raise ArgumentError(
                    f"{who}: this is the state of another optimizer: its options are "
                    f"{sorted(set(group) - {'params'})}, expected {sorted(self.defaults)}"
                )
        mine, sizes = ([len(group["params"]) for group in some] for some in (self.param_groups, groups))
        if sizes != mine:
            raise ArgumentError(f"{who}: groups of {sizes} parameters, this optimizer has {mine}")
        return groups, states

    def _check_counters(self, own: Mapping[str, Any], p: Tensor, who: str) -> None:
        """Raise where a state counts what this optimizer does not."""
        if type(self).rule is Optimizer.rule or not p.ndim:  # one that keeps what it likes; arrays look like numbers
            return
        counted = {key for key, value in own.items() if value is not None and np.ndim(value) == 0}
        if unknown := counted - self.counters.keys() - {"step"}:  # some of other libraries count steps
            raise ArgumentError(
                f"{who}: this is the state of another optimizer: it keeps {sorted(unknown)} of a parameter, expected "
                f"{sorted(self.counters) or 'no numbers'}"
            )

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v}" for k, v in self.param_groups[0].items() if k != "params")
        count = sum(p.size for group in self.param_groups for p in group["params"])
        return f"{type(self).__name__}({shown})  {count:,} parameters"


class _Batch:
    """Parameters of a group that are updated by the same numbers."""

    def __init__(self, numbers: tuple[float, ...], counters: dict[str, Any]) -> None:
        self.numbers, self.counters = numbers, counters
        self.params: list[Tensor] = []
        self.arrays: list[np.ndarray] = []
        self.elements = 0


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return value.copy() if isinstance(value, np.ndarray) else value


def _fitted(value: Any, p: Tensor, who: str) -> Any:
    """A loaded value in the parameter's dtype, checked against its shape."""
    if not isinstance(value, (np.ndarray, Tensor)):
        return _copied(value)
    array = np.array(value, p.dtype, order="C")
    if array.ndim and array.shape != p.shape:
        raise ShapeError(f"{who} has shape {array.shape}, expected {p.shape}")
    return array


def flat_gradients(params: Iterable[Tensor]) -> np.ndarray:
    """All gradients in one vector, zeros where there is none."""
    return np.concatenate([np.zeros(p.size, p.dtype) if p.grad is None else p.grad.reshape(-1) for p in params])
