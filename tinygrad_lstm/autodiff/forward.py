"""jvp: record a function, replay the tape forwards with tangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.autodiff.reverse import check_callable, foreign, opened, unlinked, variables
from tinygrad_lstm.errors import DTypeError, ShapeError
from tinygrad_lstm.primitive import Aval, zeros
from tinygrad_lstm.pushforward import push
from tinygrad_lstm.record import now
from tinygrad_lstm.tape import Output, Tape, observed, recording, state
from tinygrad_lstm.tensor import Tensor, as_like
from tinygrad_lstm.tree import flatten, leaf_paths, unflatten

__all__ = ["along", "jvp", "push_entries"]


def push_entries(entries: Sequence[Any], tangents: dict[Any, Tensor]) -> None:
    """Replay recorded entries forwards; ``tangents`` maps nodes to tangents and is filled in."""
    for record, inputs, outputs in entries:
        moving = [tangent_of(a, tangents) if isinstance(a, Tensor) else None for a in inputs]
        if all(t is None for t in moving):
            continue
        pushed = push(record.primitive, inputs, outputs, record.params, moving)
        for index, tangent in enumerate(pushed):
            if tangent is not None and outputs[index].dtype.kind == "f":  # an integer does not move
                tangents[record if record.output_avals is None else (record, index)] = tangent


def tangent_of(t: Any, tangents: dict[Any, Tensor]) -> Tensor | None:
    """The tangent of a tensor's node, None for zero."""
    node = t._node or t
    return tangents.get((node.record, node.index) if node.__class__ is Output else node)


def jvp(f: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """``(f(*primals), the derivative of f at primals in the direction of tangents)``.

    Parameters
    ----------
    primals, tangents : tuples of arrays, Tensors or trees
        Of the same structure and shapes; a tangent leaf takes its primal's dtype.  The tangent of a Module is a dict by
        parameter name.

    Examples
    --------
    >>> import tinygrad_lstm as tg
    >>> out, slope = tg.jvp(lambda x: x * x, (3.0,), (1.0,))
    >>> out.item(), slope.item()
    (9.0, 6.0)
    """
    if not isinstance(primals, (tuple, list)) or not isinstance(tangents, (tuple, list)):
        raise DTypeError("jvp: primals and tangents are tuples, one entry per argument; write (x,) for one")
    if len(primals) != len(tangents):
        raise ShapeError(f"jvp: {len(primals)} primals and {len(tangents)} tangents")
    check_callable(f, "jvp")
    return along(f, primals, tangents, "jvp", "tangent")


def along(
    f: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any], who: str, what: str
) -> tuple[Any, Any]:  # fmt: skip
    """:func:`jvp` for a function that errors name as ``who``, which calls a tangent ``what``."""
    f, primals = opened(f, primals)
    enabled = state().enabled
    since = now()
    sources: list[Tensor] = []
    with recording(enabled=True):
        seeds: dict[Any, Tensor] = {}
        arguments = []
        for k, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):
            fresh, treedef, rebuilt = variables(primal, f"{who}: argument {k}", requires_grad=False)
            given, given_tree = flatten(tangent)
            if given_tree != treedef:  # lists for tuples, or another order of the keys
                by_path = dict(zip(leaf_paths(tangent), given, strict=True))
                wanted = leaf_paths(primal)
                if by_path.keys() != set(wanted):
                    shown = lambda paths: ", ".join([path or "itself" for path in paths][:6]) or "none"
                    raise ShapeError(
                        f"{who}: {what} {k} has leaves {shown(by_path)}, its primal {shown(wanted)}; give one of "
                        "its shape for each (zeros where nothing moves)"
                    )
                given = [by_path[path] for path in wanted]
            for v, t in zip(fresh, given, strict=True):
                t = as_like(t, v.dtype)
                if t.shape != v.shape:
                    raise ShapeError(f"{who}: {what} of shape {t.shape} for a primal of shape {v.shape}")
                seeds[v._node or v] = t
            sources += fresh
            arguments.append(rebuilt)
        recorder = Tape()
        with recorder:
            result = f(*arguments)
        with np.errstate(divide="ignore", invalid="ignore"):  # as in the reverse replay
            push_entries(recorder.entries, seeds)
        outs, out_tree = flatten(result)
        moved = []
        for out in outs:
            if not isinstance(out, Tensor):
                raise DTypeError(f"{who}: the function returned a {type(out).__name__}, expected Tensors")
            tangent = tangent_of(out, seeds)
            moved.append(zeros(Aval(out.shape, out.dtype)) if tangent is None else tangent)
    if not (enabled and (observed(sources) or foreign([*outs, *moved], sources, since))):
        moved, result = unlinked(moved), unlinked(result)
    return result, unflatten(out_tree, moved)
