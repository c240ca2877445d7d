"""The primitive behind ``scan``: its parameter is a Program, its VJP a reverse scan over the adjoint body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.binding import record_application
from tinygrad_lstm.errors import GraphError
from tinygrad_lstm.ops.linked import Residuals, linked
from tinygrad_lstm.ops.prepared import (
    Site,
    _adjoint,
    _derived,
    _float_carries,
    _loops,
    _owner,
    apart,
    canonical,
    plan_of,
    site_of,
)  # fmt: skip
from tinygrad_lstm.ops.prepared import (
    _known as _known,
)
from tinygrad_lstm.ops.shape import reshape
from tinygrad_lstm.primitive import EXPLAINED, Aval, Primitive, zeros
from tinygrad_lstm.program import Program
from tinygrad_lstm.replays import Offer
from tinygrad_lstm.tape import state
from tinygrad_lstm.tensor import Tensor

__all__ = ["INNER", "bind_scan", "canonical", "scan_primitive"]


def _forward(
    *operands: np.ndarray,
    body: Program,
    n_carry: int,
    n_ys: int,
    length: int,
    reverse: bool,
    keep: Residuals | None = None,
    memory: Any = None,
) -> tuple[np.ndarray, ...]:
    if keep is None:
        final, outs = _loops().run_loop(plan_of(body, n_carry, n_ys, length), operands, reverse)
        return (*final, *apart(outs))
    if keep.segments is not None:
        return keep.segments.forward(operands)
    outputs, keep.arrays = keep.site.run(operands)
    return tuple(outputs)


def _aval(
    *operands: Aval, body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, memory: Any = None
) -> tuple[Aval, ...]:
    avals = body.output_avals()
    ys = [Aval((length, *a.shape), a.dtype) for a in avals[n_carry : n_carry + n_ys]]
    return (*(Aval(a.shape, a.dtype) for a in avals[:n_carry]), *ys, *avals[n_carry + n_ys :])


def _vjp(
    g: Sequence[Any], inputs: Sequence[Tensor], body: Program, n_carry: int, n_ys: int, length: int, reverse: bool,
    record: Any, wanted: Sequence[bool],
) -> list[Any]:  # fmt: skip
    """Scan the adjoint body in the other direction."""
    present = tuple([cotangent is not None for cotangent in g[n_carry:]])
    asked = tuple(wanted[n_carry:])
    kept = record.saved[-1]
    if record.params.get("lead"):
        g = [c if c is None or k >= n_carry else reshape(c, c.shape[1:]) for k, c in enumerate(g)]
    if kept.__class__ is Residuals and kept.segments is None and not state().enabled:
        back = kept.site.backward(present, asked)
        if back is not None and back.picks is not None:
            return back.run(g, inputs, kept.arrays)
    segments = kept.segments if isinstance(kept, Residuals) and not state().enabled else None
    n_inputs = len(body.inputs)
    floats = _float_carries(body, n_carry)
    seeds = [zeros(body.avals[body.inputs[k]]) if g[k] is None else g[k] for k in floats]
    y_seeds = [c for c in g[n_carry : n_carry + n_ys] if c is not None]
    s_seeds = [c for c in g[n_carry + n_ys :] if c is not None]
    if segments is not None:
        arrays = [[t._data for t in tensors] for tensors in (inputs, seeds, y_seeds, s_seeds)]
        results = tuple([Tensor(array) for array in segments.backward(present, asked, *arrays)])
    else:
        pair = _adjoint(body, n_carry, n_ys, present, asked)
        xs = inputs[n_carry:n_inputs]
        residuals = _residuals(pair, inputs, body, n_carry, n_ys, length, reverse, record)
        results = scan_primitive.bind(
            (*seeds, *residuals, *(xs[k] for k in pair.reads), *y_seeds, *inputs[n_inputs:], *s_seeds),
            {
                "body": pair.backward,
                "n_carry": len(seeds),
                "n_ys": sum(asked[: len(xs)]),
                "length": length,
                "reverse": not reverse,
            },
        )
    return _shares(results, floats, n_carry, asked)


def _shares(results: Sequence[Any], floats: Sequence[int], n_carry: int, asked: Sequence[bool]) -> list[Any]:
    """The results of an adjoint loop as cotangents of the scan's operands, None where none is asked for."""
    shares: list[Any] = [None] * (n_carry + len(asked))
    for k, share in zip(floats, results, strict=False):
        shares[k] = share
    positions = [n_carry + k for k, yes in enumerate(asked) if yes]
    for position, share in zip(positions, results[len(floats) :], strict=True):
        shares[position] = share
    return shares


def _residuals(
    pair: Any, inputs: Sequence[Tensor], body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, record: Any
) -> list[Tensor]:
    """The residuals that the forward kept, or, where they must be differentiable themselves, of a second run."""
    kept = record.saved[-1]
    if isinstance(kept, Residuals) and kept.arrays and not state().enabled:
        known = dict(zip(kept.site.forward()[0].residuals, kept.arrays, strict=True))
        if all(slot in known for slot in pair.residuals):
            return [Tensor(known[slot]) for slot in pair.residuals]
    more = len(pair.residuals)
    outs = scan_primitive.bind(
        tuple(inputs),
        {"body": pair.forward, "n_carry": n_carry, "n_ys": n_ys + more, "length": length, "reverse": reverse},
    )
    return list(outs[n_carry + n_ys : n_carry + n_ys + more])


def _jvp(
    tangents: Sequence[Any], *values: Any, body: Program, n_carry: int, n_ys: int, length: int, reverse: bool,
    memory: Any = None,
) -> list[Any]:  # fmt: skip
    """A scan over (carry, tangent)."""
    inputs = values[:-1]
    n_inputs = len(body.inputs)
    floats = _float_carries(body, n_carry)
    moving = [k for k in range(n_carry, len(inputs)) if tangents[k] is not None]
    program, n_moving = _derived(
        body, ("tangent", n_carry, n_ys, tuple(moving)), lambda: _tangent_body(body, n_carry, n_ys, floats, moving)
    )
    starts = [zeros(body.avals[body.inputs[k]]) if tangents[k] is None else tangents[k] for k in floats]
    moving_xs = [tangents[k] for k in moving if k < n_inputs]
    moving_captures = [tangents[k] for k in moving if k >= n_inputs]
    outs = scan_primitive.bind(
        (*inputs[:n_carry], *starts, *inputs[n_carry:n_inputs], *moving_xs, *inputs[n_inputs:], *moving_captures),
        {
            "body": program,
            "n_carry": n_carry + len(floats),
            "n_ys": n_ys + n_moving[0],
            "length": length,
            "reverse": reverse,
        },
    )
    result: list[Any] = [None] * (len(body.outputs))
    for k, t in zip(floats, outs[n_carry : n_carry + len(floats)], strict=True):
        result[k] = t
    start = n_carry + len(floats) + n_ys
    float_ys = [k for k in range(n_carry, n_carry + n_ys) if np.dtype(body.aval(body.outputs[k]).dtype).kind == "f"]
    for k, t in zip(float_ys, outs[start : start + len(float_ys)], strict=True):
        result[k] = t
    n_sums = len(body.outputs) - n_carry - n_ys
    for k, t in zip(range(n_carry + n_ys, len(body.outputs)), outs[len(outs) - n_sums :], strict=True):
        result[k] = t
    return result


def _tangent_body(
    body: Program, n_carry: int, n_ys: int, floats: Sequence[int], moving: Sequence[int]
) -> tuple[Program, tuple[int, int]]:
    from tinygrad_lstm.autodiff.forward import push_entries, tangent_of
    from tinygrad_lstm.compiler.constants import fill
    from tinygrad_lstm.compiler.simplify import simplify
    from tinygrad_lstm.program import lower
    from tinygrad_lstm.tape import recording
    from tinygrad_lstm.trace import Trace

    n_inputs = len(body.inputs)
    recorder = Trace()
    with recording(enabled=True, tapes=(), names=None, trace=recorder):
        sources = [recorder.new(body.avals[slot]) for slot in (*body.inputs, *body.captures)]
        outs = body.apply(sources[:n_inputs], sources[n_inputs:])
        fresh = {k: recorder.new(Aval(sources[k].shape, sources[k].dtype)) for k in (*floats, *moving)}
        tangents: dict[Any, Tensor] = {sources[k]: t for k, t in fresh.items()}
        push_entries(list(recorder.entries), tangents)

        def moved(out: Tensor) -> Tensor:
            found = tangent_of(out, tangents)
            return zeros(Aval(out.shape, out.dtype)) if found is None else found

        carry_tangents = [moved(outs[k]) for k in floats]
        y_tangents = [moved(o) for o in outs[n_carry : n_carry + n_ys] if np.dtype(o.dtype).kind == "f"]
        sums = outs[n_carry + n_ys :]
        results = [*outs[:n_carry], *carry_tangents, *outs[n_carry : n_carry + n_ys], *y_tangents]
        results += [*sums, *(moved(o) for o in sums)]
    order = [
        *sources[:n_carry], *(fresh[k] for k in floats), *sources[n_carry:n_inputs],
        *(fresh[k] for k in moving if k < n_inputs),
    ]  # fmt: skip
    captures = [*sources[n_inputs:], *(fresh[k] for k in moving if k >= n_inputs)]
    program, constants = lower(recorder.entries, [*order, *captures], results)
    recorder.close()
    program = program.replaced(
        inputs=program.inputs[: len(order)], captures=(*program.inputs[len(order) :], *program.captures)
    )
    return simplify(fill(program, constants)), (len(y_tangents), len(sums))


scan_primitive: Primitive = Primitive(
    "scan", _forward, (_vjp,), joint=True, jvp=_jvp, shape=_aval, always_tuple=True,
    doc="A loop over axis 0: operands (carry..., xs..., captures...), results (carry..., ys..., sums...).",
)  # fmt: skip


def _prepared(record: Any, given: Sequence[bool], asked: Sequence[bool]) -> Offer | None:
    """What a known replay does for a scan whose forward kept what its adjoint loop reads."""
    kept = record.saved[-1]
    if kept.__class__ is not Residuals or kept.segments is not None or kept.site.generation != Primitive.generation:
        return None
    site, params = kept.site, record.params
    back = site.backward(tuple(given[site.n_carry :]), tuple(asked[site.n_carry :]))
    if back is None or back.picks is None or True in given[: site.n_carry]:
        return None
    conditions = [
        ("{r}.params is {a}", {"a": params}),
        ("{r}.saved[-1].__class__ is {a} and {r}.saved[-1].segments is None", {"a": Residuals}),
        ("{r}.saved[-1].site is {a}", {"a": site}),
    ]

    pulled = back.called(len(record.saved) - 1)
    # What flows to an initial state is found in any case, and given to the nodes that are there.
    return Offer(conditions, [(tuple(back.positions), "{f}(({g},), {r}.saved, {r}.saved[-1].arrays)")], {"f": pulled})


scan_primitive.may_skip = False
scan_primitive.prepared = _prepared  # type: ignore[method-assign]


def _inner_forward(
    *operands: np.ndarray, body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, lead: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    turned = [np.moveaxis(x, at, 0) for x, at in zip(operands[n_carry:], lead, strict=False)]
    rest = operands[n_carry + len(lead) :]
    outs = _forward(
        *operands[:n_carry], *turned, *rest, body=body, n_carry=n_carry, n_ys=n_ys, length=length, reverse=reverse
    )
    ys = [np.ascontiguousarray(np.moveaxis(y, 0, 1)) for y in outs[n_carry : n_carry + n_ys]]
    return (*outs[:n_carry], *ys, *outs[n_carry + n_ys :])


def _inner_avals(
    *operands: Aval, body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, lead: tuple[int, ...]
) -> tuple[Aval, ...]:
    avals = body.output_avals()
    ys = [Aval((a.shape[0], length, *a.shape[1:]), a.dtype) for a in avals[n_carry : n_carry + n_ys]]
    return (*avals[:n_carry], *ys, *avals[n_carry + n_ys :])


def _no_rule(*args: Any) -> Any:
    raise GraphError("inner scans are made after differentiation")


INNER: Primitive = Primitive(
    "inner_scan",
    _inner_forward,
    (lambda g, position: _no_rule(g, position),),
    shape=_inner_avals,
    always_tuple=True,
    register=False,  # made by a pass (compiler/batch_first.py), never called by anybody
    doc="A scan with time as axis ``lead`` (0 or 1) of each x and as axis 1 of ys, behind the batch.",
)


def bind_scan(
    body: Program, operands: Sequence[Tensor], n_carry: int, n_ys: int, length: int, reverse: bool,
    memory: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run a scan, keeping residuals (within ``memory``) where somebody may ask for gradients."""
    params: dict[str, Any] = {"body": body, "n_carry": n_carry, "n_ys": n_ys, "length": length, "reverse": reverse}
    current = state()
    every, needs = bool(current.tapes), True in [t._rg for t in operands]
    if not current.enabled or current.trace is not None or not (every or needs):
        if memory is not None and current.trace is not None:
            if current.enabled and current.trace.runs:
                from tinygrad_lstm.ops.within import bind_within

                return bind_within(body, operands, n_carry, n_ys, length, reverse, memory)
            params["memory"] = memory  # part of what is recorded: memory_plan reads it
        return scan_primitive.bind(tuple(operands), params)
    linked = tuple([(t._rg or every) and t._data.dtype.kind == "f" for t in operands[n_carry:]])
    site = site_of(body, n_carry, n_ys, length, reverse, linked)
    if memory is None:
        return bind_site(site, tuple(operands), needs, current)
    kept = Residuals(site)
    from tinygrad_lstm.ops.segments import segmented

    kept.segments = segmented(site, memory)
    return bind_site(site, tuple(operands), needs, current, kept)


def bind_site(
    site: Site, operands: tuple[Tensor, ...], needs: bool, current: Any, kept: Residuals | None = None,
    lead: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run a scan whose gradient may be asked for: all that is not known beforehand.

    With ``lead`` the final carry has one more axis, of length 1, in front: the state of a single layer.
    """
    arrays = [t._data for t in operands]
    try:
        if kept is None and site.shared is not None and not current.tapes:
            return linked_loop(site, lead)(*operands)
        kept = kept or Residuals(site)
        if kept.segments is None:
            made, kept.arrays = site.run(arrays)
        else:
            made = list(kept.segments.forward(tuple(arrays)))
    except EXPLAINED as error:
        raise scan_primitive._explained(error, operands, {**site.params, "keep": kept}) from None
    if kept.segments is None:
        if site.shared is None:
            site.shared = _shared(made, kept.arrays)
        kept.shared = site.shared
    if lead:
        made[: site.n_carry] = [a[None] for a in made[: site.n_carry]]
    outs = tuple([Tensor(a if a.__class__ is np.ndarray else np.asarray(a)) for a in made])
    for k in kept.shared:
        outs[k]._used = True
    params, avals = (site.led_params, site.led_avals) if lead else (site.params, site.avals)
    # The residuals are the record's own: released with it, and no parameter of the program.
    record_application(scan_primitive, operands, params, outs, needs, current, True, avals, kept)
    return outs


def linked_loop(site: Site, lead: bool) -> Callable[..., tuple[Tensor, ...]]:
    """The function of :func:`.linked` for a site that was run before; made once."""
    found = site.linked.get(lead)
    if found is None:
        found = site.linked[lead] = linked(scan_primitive, site, lead)
    return found


def _shared(outs: Sequence[np.ndarray], residuals: Sequence[np.ndarray]) -> frozenset[int]:
    """The outputs that have their memory in common with a residual: a write to one must be noticed."""
    owners = {id(_owner(array)) for array in residuals}
    return frozenset(k for k, out in enumerate(outs) if id(_owner(out)) in owners)
