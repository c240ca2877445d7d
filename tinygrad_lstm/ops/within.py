"""Scans within a memory budget as equations of a recorded function: what ``tg.compile`` sees of ``memory=``.

A scan that runs by itself keeps what its schedule says beside the tape.  In a recorded function there is only
what stands in the program, so the forward equation also returns the carries between its segments, and the
derivative is one equation that takes them: it runs the segments again, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.schedule import Memory
from tinygrad_lstm.ops import loop
from tinygrad_lstm.ops.prepared import _derived, _every_site, _float_carries, compile_mode
from tinygrad_lstm.ops.segments import Segments, segmented
from tinygrad_lstm.primitive import Aval, Primitive, zeros
from tinygrad_lstm.program import Program
from tinygrad_lstm.tape import differentiate, recording
from tinygrad_lstm.tensor import Tensor

__all__ = ["bind_within", "scan_within"]


def _segments(body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, memory: Memory) -> Segments | None:
    # By its text: one byte and all of it are equal as numbers.
    key = ("within", n_carry, n_ys, length, reverse, repr(memory), compile_mode())
    return _derived(body, key, lambda: segmented(_every_site(body, n_carry, n_ys, length, reverse), memory))


def _forward(
    *operands: np.ndarray, body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, memory: Memory
) -> tuple[np.ndarray, ...]:
    segments = _segments(body, n_carry, n_ys, length, reverse, memory)
    assert segments is not None
    return segments.forward_with_borders(operands)


def _aval(
    *operands: Aval, body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, memory: Memory
) -> tuple[Aval, ...]:
    segments = _segments(body, n_carry, n_ys, length, reverse, memory)
    assert segments is not None
    results = loop._aval(*operands, body=body, n_carry=n_carry, n_ys=n_ys, length=length, reverse=reverse)
    return (*results, *segments.border_avals)


def _vjp(
    g: Sequence[Any], inputs: Sequence[Tensor], out: Sequence[Tensor], body: Program, n_carry: int, n_ys: int,
    length: int, reverse: bool, memory: Memory, wanted: Sequence[bool],
) -> list[Any]:  # fmt: skip
    n_outs = len(body.outputs)
    floats = _float_carries(body, n_carry)
    given = g[n_carry:n_outs]
    seeds = [zeros(body.avals[body.inputs[k]]) if g[k] is None else g[k] for k in floats]
    asked = tuple(wanted[n_carry:])
    results = _back.bind(
        (*inputs, *seeds, *(c for c in given if c is not None), *out[n_outs:]),
        {
            "body": body, "n_carry": n_carry, "n_ys": n_ys, "length": length, "reverse": reverse, "memory": memory,
            "present": tuple(c is not None for c in given), "asked": asked,
        },
    )  # fmt: skip
    return loop._shares(results, floats, n_carry, asked)


def _jvp(
    tangents: Sequence[Any], *values: Any, body: Program, n_carry: int, n_ys: int, length: int, reverse: bool,
    memory: Memory,
) -> list[Any]:  # fmt: skip
    """That of the scan; the carries between segments are no results of their own."""
    moved = loop._jvp(tangents, *values, body=body, n_carry=n_carry, n_ys=n_ys, length=length, reverse=reverse)
    return [*moved, *[None] * (len(values[-1]) - len(moved))]


scan_within: Primitive = Primitive(
    "scan_within", _forward, (_vjp,), joint=True, jvp=_jvp, shape=_aval, always_tuple=True, register=False,
    doc="A scan within a memory budget: results as of scan, then the carries between its segments.",
)  # fmt: skip


# ---------------------------------------------------------------------------- its derivative


def _parts(
    operands: Sequence[Any], body: Program, n_carry: int, n_ys: int, present: Sequence[bool]
) -> tuple[Sequence[Any], ...]:
    """The operands of the derivative: (of the scan, of carries, of ys, of sums, borders)."""
    sizes = [
        len(body.inputs) + len(body.captures), len(_float_carries(body, n_carry)), sum(present[:n_ys]),
        sum(present[n_ys:]),
    ]  # fmt: skip
    found: list[Sequence[Any]] = []
    for size in sizes:
        found.append(operands[:size])
        operands = operands[size:]
    return (*found, operands)


def _back_forward(
    *operands: np.ndarray, body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, memory: Memory,
    present: tuple[bool, ...], asked: tuple[bool, ...],
) -> tuple[np.ndarray, ...]:  # fmt: skip
    segments = _segments(body, n_carry, n_ys, length, reverse, memory)
    assert segments is not None
    return tuple(segments.backward(present, asked, *_parts(operands, body, n_carry, n_ys, present)))


def _back_aval(
    *operands: Aval, body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, memory: Memory,
    present: tuple[bool, ...], asked: tuple[bool, ...],
) -> tuple[Aval, ...]:  # fmt: skip
    chosen = [operands[k] for k in _float_carries(body, n_carry)]
    chosen += [operands[n_carry + k] for k, yes in enumerate(asked) if yes]
    return tuple(Aval(aval.shape, aval.dtype) for aval in chosen)


def _back_vjp(
    g: Sequence[Any], inputs: Sequence[Tensor], body: Program, n_carry: int, n_ys: int, length: int, reverse: bool,
    memory: Memory, present: tuple[bool, ...], asked: tuple[bool, ...], wanted: Sequence[bool],
) -> list[Any]:  # fmt: skip
    """A gradient that is differentiated again keeps everything: the derivative of the scan without a budget."""
    from tinygrad_lstm.autodiff.reverse import variable

    floats = _float_carries(body, n_carry)
    n_borders = len(_parts(inputs, body, n_carry, n_ys, present)[-1])
    moving = [w and k < len(inputs) - n_borders for k, w in enumerate(wanted)]
    with recording(enabled=True):
        arguments = [variable(t) if m else t for t, m in zip(inputs, moving, strict=True)]
        operands, seeds, y_seeds, s_seeds, _ = _parts(arguments, body, n_carry, n_ys, present)
        given = iter((*y_seeds, *s_seeds))
        cotangents: list[Any] = [None] * n_carry + [next(given) if yes else None for yes in present]
        for k, seed in zip(floats, seeds, strict=True):
            cotangents[k] = seed
        shares = loop._vjp(
            cotangents, operands, body, n_carry, n_ys, length, reverse, SimpleNamespace(saved=(None,), params={}),
            (*(k in floats for k in range(n_carry)), *asked),
        )  # fmt: skip
    outs = [shares[k] for k in floats] + [shares[n_carry + k] for k, yes in enumerate(asked) if yes]
    pairs = [(o, c) for o, c in zip(outs, g, strict=True) if c is not None]
    sources = [a for a, m in zip(arguments, moving, strict=True) if m]
    found = iter(differentiate([o for o, _ in pairs], [c for _, c in pairs], sources, frontier=True))
    return [next(found) if m else None for m in moving]


_back: Primitive = Primitive(
    "scan_within_back", _back_forward, (_back_vjp,), joint=True, shape=_back_aval, always_tuple=True, register=False,
    doc="The derivative of scan_within: operands (of the scan..., cotangents..., borders...).",
)  # fmt: skip


def bind_within(
    body: Program, operands: Sequence[Tensor], n_carry: int, n_ys: int, length: int, reverse: bool, memory: Memory
) -> tuple[Tensor, ...]:
    """Record a scan within a budget; a plain one where the budget suffices for everything."""
    params = {"body": body, "n_carry": n_carry, "n_ys": n_ys, "length": length, "reverse": reverse}
    if _segments(memory=memory, **params) is None:  # type: ignore[arg-type]
        return loop.scan_primitive.bind(tuple(operands), params)
    return scan_within.bind(tuple(operands), {**params, "memory": memory})[: len(body.outputs)]
