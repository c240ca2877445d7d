"""What all optimizers share: parameter groups, their state, and one way to run an update rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.kernels import Expression, build, fused
from tinygrad_lstm.kernels.elementwise import THRESHOLD
from tinygrad_lstm.tape import state as recording_state
from tinygrad_lstm.tensor import Tensor

__all__ = ["Optimizer", "as_parameters", "update"]

Rule = Callable[..., tuple[Any, ...]]


@functools.lru_cache(maxsize=256)
def _expression(rule: Rule, n_inputs: int) -> Expression:
    return build(rule, n_inputs)


def update(rule: Rule, written: Sequence[np.ndarray], read: Sequence[np.ndarray], numbers: Sequence[float]) -> None:
    """Overwrite the arrays ``written`` by ``rule(*written, *read, *numbers)``.

    The rule is a function on symbolic scalars that returns one new value per written array: large arrays
    are passed through once, in one native loop; small ones go through NumPy.
    """
    expression = _expression(rule, len(written) + len(read) + len(numbers))
    first = written[0]
    if first.size >= THRESHOLD and first.dtype.name in ("float32", "float64"):
        arrays = (*written, *read, *[np.asarray(x, first.dtype) for x in numbers])
        fused(expression, [a.dtype for a in arrays])(arrays, written)
        return
    with np.errstate(all="ignore"):
        values = expression.numpy(*written, *read, *[float(x) for x in numbers])
    for target, value in zip(written, values if isinstance(values, tuple) else (values,), strict=True):
        np.copyto(target, value, casting="same_kind")


def as_parameters(params: Any, who: str) -> list[Tensor]:
    """The parameters of a module, or those in an iterable."""
    if isinstance(params, Tensor):
        raise DTypeError(f"{who}: one Tensor given; pass a Module or a list of parameters")
    if hasattr(params, "parameters"):
        params = params.parameters()
    found = list(params)
    for p in found:
        if not isinstance(p, Tensor):
            raise DTypeError(f"{who}: parameters are Tensors, found {type(p).__name__}")
    return found


class Optimizer:
    """Base class: ``step()`` changes the parameters in place by their ``.grad``.

    Parameters
    ----------
    params : Module, iterable of Parameters, or iterable of dicts
        A dict is a group: ``{"params": ..., "lr": ...}`` with options of its own.
    defaults : dict
        The options of groups that do not set them.

    Attributes
    ----------
    param_groups : list of dicts
        The options of every group, which may be changed between steps, and its "params".
    state : dict
        Parameter -> dict of arrays and numbers.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[int, dict[str, Any]] = {}  # by id of the parameter, which the groups keep alive
        self._check(defaults)
        single = hasattr(params, "parameters") or isinstance(params, (Tensor, Mapping))
        groups: list[Any] = [params] if single else list(params)
        if groups and all(isinstance(group, Mapping) for group in groups):
            for group in groups:
                self.add_param_group(dict(group))
        else:
            self.add_param_group({"params": groups[0] if single else groups})

    def _check(self, options: Mapping[str, Any]) -> None:
        """Raise unless the options are in their ranges."""
        who = type(self).__name__
        for key, value in options.items():
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            bounded = key in ("betas", "alpha", "rho")
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
            raise ArgumentError(
                f"{who}: a group has 'params' and options of {sorted(self.defaults)}, found {sorted(group)}"
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
        loss = None if closure is None else closure()
        if recording_state().trace is not None:
            raise ArgumentError(f"{type(self).__name__}.step() inside of a recorded function; call it outside")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)
        return loss

    def _step_one(self, p: Tensor, group: dict[str, Any]) -> None:
        data = p._data
        if not (data.flags.c_contiguous and data.flags.writeable):
            p._replace(np.array(data, order="C"))
            data = p._data
        gradient = p.grad
        if group.get("maximize"):
            gradient = -gradient  # type: ignore[operator]
        own = self.state.setdefault(id(p), {})
        self.update(data, gradient, own, group)  # type: ignore[arg-type]
        p._bump()

    def update(self, p: np.ndarray, g: np.ndarray, own: dict[str, Any], group: dict[str, Any]) -> None:
        """Change ``p`` in place by its gradient ``g``; ``own`` is the state of this parameter."""
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
        try:
            groups, states = list(state["param_groups"]), dict(state["state"])
            sizes = [len(group["params"]) for group in groups]
        except (KeyError, TypeError) as error:
            raise ArgumentError(f"{who}: this is no state of an optimizer: {error!r}") from None
        mine = [len(group["params"]) for group in self.param_groups]
        if sizes != mine:
            raise ArgumentError(f"{who}: groups of {sizes} parameters, this optimizer has {mine}")
        loaded: dict[int, dict[str, Any]] = {}
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                own = states.get(str(number), states.get(number))
                if own is not None:
                    what = f"{who}: {{}} of parameter {number}"
                    loaded[id(p)] = {key: _fitted(value, p, what.format(key)) for key, value in own.items()}
                number += 1
        for group, given in zip(self.param_groups, groups, strict=True):
            for key, value in given.items():
                if key != "params":
                    group[key] = tuple(value) if isinstance(value, list) else value
        self.state = loaded

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v}" for k, v in self.param_groups[0].items() if k != "params")
        count = sum(p.size for group in self.param_groups for p in group["params"])
        return f"{type(self).__name__}({shown})  {count:,} parameters"


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
