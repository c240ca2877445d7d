"""A run that is watched: every named value and every state at every step, with their gradients.

The run is op by op (``tg.eager()``) under a Tape.  Which values are states is read off the tape: what one step makes
and the next one uses.  What a step adds to a parameter's gradient is what the rules of the operations that use the
parameter in that step pull back; nothing is differentiated by hand here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError, GraphError, ShapeError
from tinygrad_lstm.inspect.table import norm
from tinygrad_lstm.nn.module import Module
from tinygrad_lstm.record import Output, Record
from tinygrad_lstm.tape import Tape, eager, no_grad
from tinygrad_lstm.tensor import Tensor

__all__ = ["Series", "Watched", "watch"]

MOST_BYTES = 2**30  # of gradients that are held at once


class Series(NamedTuple):
    """One named value at all steps.

    Attributes
    ----------
    name : str
        With the module's path in front where the name alone would stand for several.
    kind : "state" or "gate"
    values, gradients : ndarray (T, ...)
        The gradient is that of the loss; zero where no path leads to it.
    reverse : bool
        Whether the loop ran from the last step to the first.
    """

    name: str
    kind: str
    values: np.ndarray
    gradients: np.ndarray
    reverse: bool


class Watched(NamedTuple):
    """What :func:`watch` saw.

    Attributes
    ----------
    loss : float
    steps : int
    series : list of Series
        States first, in the order in which a step makes them.
    parameters : dict
        name -> norms (T,) of what each step adds to the parameter's gradient, of parameters that steps use.
    accumulated : dict
        name -> norms (T,) of the sum of what the steps t .. T-1 add.
    totals : dict
        name -> norm of the gradient, of all parameters.
    """

    loss: float
    steps: int
    series: list[Series]
    parameters: dict[str, np.ndarray]
    accumulated: dict[str, np.ndarray]
    totals: dict[str, float]


class _Use(NamedTuple):
    """An operation of one step that uses a parameter."""

    step: int
    parameter: str
    record: Record
    operand: int
    output: int  # the place of its outputs among the sources


def watch(who: str, model: Any, x: Any, loss: Callable[..., Any], target: Any = None, lengths: Any = None) -> Watched:
    """Run ``loss(model(x))`` (``loss(model(x), target)`` with a target) op by op, and go back through it."""
    if not isinstance(model, Module):
        raise DTypeError(f"{who}: the model is a Module, found {type(model).__name__}")
    if not callable(loss):
        raise DTypeError(f"{who}: loss is a function of the model's output, found {type(loss).__name__}")
    with Tape() as tape, eager():
        output = model(x) if lengths is None else model(x, lengths=lengths)
        value = loss(output) if target is None else loss(output, target)
    if not isinstance(value, Tensor):
        raise DTypeError(f"{who}: loss returned {type(value).__name__}, expected a Tensor with one element")
    if value.size != 1:
        raise ShapeError(f"{who}: loss returned shape {value.shape}, expected a scalar; take .sum() or .mean() of it")
    if not tape.entries:
        raise GraphError(f"{who}: nothing was recorded; call it outside of no_grad()")
    steps = 1 + max((record.place.step for record in tape.records if record.place.step is not None), default=-1)
    if not steps:
        raise ArgumentError(
            f"{who}: no step of a recurrent layer or scan ran in {type(model).__name__}; a loop over time is one of "
            "nn.Recurrent (and other layers) or ops.scan, of at least one step"
        )
    found = _values(tape)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sources: list[Tensor] = [tensor for one in found.values() for tensor in one.values() if tensor.dtype.kind == "f"]
    watched = {id(tensor): k for k, tensor in enumerate(sources)}
    chosen = _chosen_by_lengths(tape)
    for _, fresh in chosen.values():
        watched.setdefault(id(fresh), len(sources))
        sources.append(fresh)
    uses = _uses(tape, names, sources)
    count = len(sources)
    sources += list(model.parameters())
    _check_size(who, sources)
    with no_grad():
        gradients = tape.gradient(value, sources, np.ones(value.shape, value.dtype))
    totals = {
        names[id(parameter)]: 0.0 if gradient is None else norm(gradient._data)
        for parameter, gradient in zip(sources[count:], gradients[count:], strict=True)
    }
    added, accumulated = _contributions(uses, gradients, steps)
    series = []
    for (name, kind), one in _named(_joined(found, chosen)).items():
        if len(one) == steps and len({tensor.shape for tensor in one.values()}) == 1:
            series.append(_series(name, kind, one, gradients, watched, chosen))
    series.sort(key=lambda s: s.kind != "state")
    return Watched(float(value._data.reshape(())), steps, series, added, accumulated, totals)


def _check_size(who: str, sources: list[Tensor]) -> None:
    size = sum(tensor.size * tensor.dtype.itemsize for tensor in sources)
    if size > MOST_BYTES:
        raise ArgumentError(
            f"{who}: the gradients of all steps would take {size / 2**20:.0f} MB, at most {MOST_BYTES / 2**20:.0f} "
            "are held at once; use a shorter sequence, a smaller batch or a smaller model"
        )


# ---------------------------------------------------------------------------- values

Key = tuple[str, int, int]  # path, place among the records of a step there, which output


def _values(tape: Tape) -> Found:
    """(path, name, is a state, serial) -> step -> value: of all that has a name or crosses from a step to the next."""
    position: dict[int, Key] = {}  # serial -> key of its first output
    counters: dict[tuple[str, int], int] = {}
    outputs: dict[Key, dict[int, tuple[Record, Tensor]]] = {}
    crossing: dict[Key, None] = {}
    for record, _, tensors in tape.entries:
        step = record.place.step
        if step is None:
            continue
        at = record.place.where, step
        counters[at] = counters.get(at, -1) + 1
        position[record.serial] = (at[0], counters[at], 0)
        for k, tensor in enumerate(tensors):
            outputs.setdefault((at[0], counters[at], k), {})[step] = (record, tensor)
        for parent in record.parents or ():
            before, index = _maker(parent)
            if before is None or before.serial not in position:
                continue
            if abs((before.place.step or 0) - step) == 1:
                path, place, _ = position[before.serial]
                crossing[path, place, index] = None
    labels = {key: _label(steps, key[2]) for key, steps in outputs.items()}
    found: Found = {}
    for key, steps in outputs.items():
        label, crosses = labels[key], key in crossing
        if label is None and crosses:
            label = _inherited(steps, labels, position) or _part(steps, key[2])
        if label is not None:
            first = min(record.serial for record, _ in steps.values())
            found[key[0], label, crosses, first] = {step: tensor for step, (_, tensor) in steps.items()}
    return dict(sorted(found.items(), key=lambda item: item[0][3]))


def _maker(node: Any) -> tuple[Record | None, int]:
    if node.__class__ is Output:
        return node.record, node.index
    return (node, 0) if node.__class__ is Record else (None, 0)


def _label(steps: dict[int, tuple[Record, Tensor]], index: int) -> str | None:
    record = next(iter(steps.values()))[0]
    labels = None if record.extra is None else record.extra.label
    return None if labels is None else labels.get(index)


def _part(steps: dict[int, tuple[Record, Tensor]], index: int) -> str:
    """The name of a part of the state that has no other; the last step's value may be one of the others too."""
    parts = [r.extra.part[index] for r, _ in steps.values() if r.extra and r.extra.part and index in r.extra.part]
    return parts[0] if parts else "state"


def _inherited(
    steps: dict[int, tuple[Record, Tensor]], labels: dict[Key, str | None], position: dict[int, Key]
) -> str | None:
    """The name of the one named value that a state was selected from: past a row's length it is the old one."""
    step, (record, _) = next(iter(steps.items()))
    if record.primitive.name != "where":
        return None
    names = set()
    for parent in record.parents or ():
        before, index = _maker(parent)
        if before is not None and before.place.step == step and before.serial in position:
            path, place, _ = position[before.serial]
            names.add(labels.get((path, place, index)))
    names.discard(None)
    return names.pop() if len(names) == 1 else None


Chosen = dict[int, tuple[Record, Tensor]]
Found = dict[tuple[str, str, bool, int], dict[int, Tensor]]


def _joined(found: Found, chosen: Chosen) -> Found:
    """A state that lengths chose takes the place of the new state of the same name that it was chosen from."""
    keys = {id(tensor): key for key, one in found.items() for tensor in one.values()}
    for key, one in list(found.items()):
        origins = {keys.get(id(chosen[id(tensor)][1])) for tensor in one.values() if id(tensor) in chosen}
        origin = origins.pop() if len(origins) == 1 else None
        if origin is not None and origin != key and origin in found and origin[1] == key[1]:
            del found[origin]
            found[origin[0], key[1], True, origin[3]] = found.pop(key)
    return dict(sorted(found.items(), key=lambda item: item[0][3]))


def _named(found: Found) -> dict[tuple[str, str], dict[int, Tensor]]:
    """(shown name, kind) -> values; paths only where the names alone are not enough."""
    labels = [label for _, label, _, _ in found]
    named: dict[tuple[str, str], dict[int, Tensor]] = {}
    taken: set[str] = set()
    for (path, label, crosses, _), one in found.items():
        wanted = label if labels.count(label) == 1 or not path else f"{path}.{label}"
        free, count = wanted, 0
        while free in taken:
            count += 1
            free = f"{wanted}.{count}"
        taken.add(free)
        named[free, "state" if crosses else "gate"] = one
    return named


def _chosen_by_lengths(tape: Tape) -> Chosen:
    """id of a state that lengths chose -> the operation that did, and the new state, which it is in rows that go on."""
    made: dict[tuple[int, int], Tensor] = {}
    chosen: Chosen = {}
    for record, _, tensors in tape.entries:
        made.update(((record.serial, k), tensor) for k, tensor in enumerate(tensors))
        if record.extra is not None and record.extra.selected and record.parents:
            before, index = _maker(record.parents[1])
            if before is not None and (before.serial, index) in made:
                chosen[id(tensors[0])] = record, made[before.serial, index]
    return chosen


def _of_chosen(record: Record, gradient: Any, fresh: Any) -> Any:
    """The gradient of a state that lengths chose: the step's output and its other values use the new state itself."""
    if gradient is None:
        return None if fresh is None else fresh._data
    with no_grad():
        pulled = record.primitive.pull(record, gradient, [False, True, False])[1]
    rest = gradient._data if pulled is None else gradient._data - pulled._data
    return rest if fresh is None else rest + fresh._data


def _series(
    name: str, kind: str, one: dict[int, Tensor], gradients: list[Any], watched: dict[int, int], chosen: Chosen
) -> Series:
    order = list(one)
    values = np.stack([one[t]._data for t in sorted(one)])
    slopes = np.zeros(values.shape, values.dtype if values.dtype.kind == "f" else np.float32)
    for t, tensor in one.items():
        gradient = gradients[watched[id(tensor)]] if id(tensor) in watched else None
        slope = None if gradient is None else gradient._data
        if id(tensor) in chosen:
            record, fresh = chosen[id(tensor)]
            slope = _of_chosen(record, gradient, gradients[watched[id(fresh)]])
        if slope is not None:
            slopes[t] = slope
    return Series(name, kind, values, slopes, order != sorted(order))


# ---------------------------------------------------------------------------- parameters


def _uses(tape: Tape, names: dict[int, str], sources: list[Tensor]) -> list[_Use]:
    """Where parameters are used in steps; the outputs of those operations join the sources."""
    uses = []
    for record, _, tensors in tape.entries:
        if record.place.step is None or record.parents is None:
            continue
        indices = [k for k, parent in enumerate(record.parents) if parent is not None and id(parent) in names]
        if indices:
            uses += [_Use(record.place.step, names[id(record.parents[k])], record, k, len(sources)) for k in indices]
            sources += tensors
    return uses


def _contributions(
    uses: list[_Use], gradients: list[Any], steps: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Norms of what each step adds to the gradients of the parameters, and of the sums from each step on."""
    added = {use.parameter: np.zeros(steps) for use in uses}
    accumulated = {use.parameter: np.zeros(steps) for use in uses}
    sums: dict[str, np.ndarray] = {}
    by_step: dict[int, list[_Use]] = {}
    for use in uses:
        by_step.setdefault(use.step, []).append(use)
    for t in range(steps - 1, -1, -1):
        own: dict[str, np.ndarray] = {}
        for use in by_step.get(t, ()):
            share = _share(use, gradients)
            if share is not None:
                own[use.parameter] = own[use.parameter] + share if use.parameter in own else share
        for name, share in own.items():
            added[name][t] = norm(share)
            sums[name] = sums[name] + share if name in sums else share
        for name, total in sums.items():
            accumulated[name][t] = norm(total)
    return added, accumulated


def _share(use: _Use, gradients: list[Any]) -> np.ndarray | None:
    """What an operation's rule pulls back to the parameter."""
    record = use.record
    count = 1 if record.output_avals is None else len(record.output_avals)
    cotangents = list(gradients[use.output : use.output + count])
    if all(cotangent is None for cotangent in cotangents):
        return None
    wanted = [k == use.operand for k in range(len(record.parents or ()))]
    with no_grad():
        pulled = record.primitive.pull(record, cotangents[0] if record.output_avals is None else cotangents, wanted)
    share = pulled[use.operand]
    return None if share is None else np.array(share._data)
