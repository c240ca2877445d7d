"""Batch-axis analysis: prove that axis 0 of every carry and sequence is mapped row to row.

Only then may threads share a batch out: row r of the results must depend on row r of the inputs, and on
values that all rows share.  A shape says nothing (a batch may be as large as a layer is wide), so the proof
follows the data through every equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tinygrad_lstm.program import Equation, Program

__all__ = ["Mixing", "Rows", "common_batch", "mixing", "row_values"]


class Mixing(NamedTuple):
    """An equation for which the proof fails."""

    equation: Equation
    why: str


class Rows(NamedTuple):
    """``batch``: the number of rows; ``mapped``: the slots whose axis 0 they are; ``mixing``: what is against it."""

    batch: int
    mapped: frozenset[int]
    mixing: Mixing | None


def row_values(program: Program, n_carry: int, summed: Sequence[int] = ()) -> Rows:
    """Which values of a loop body (carry..., x...; captures...) -> (carry..., ...) have a row per sequence.

    ``summed`` are the outputs that are added up over the steps: they may also be shared values.
    """
    avals = program.avals
    batch = common_batch(program, n_carry)
    if batch is None:
        shapes = sorted({str(avals[slot].shape) for slot in program.inputs})
        nowhere = Equation(_LOOP, (), {}, ())
        why = f"carry and inputs have no common batch axis 0: {', '.join(shapes)}"
        return Rows(0, frozenset(), Mixing(nowhere, why))
    mapped = {slot for slot in program.inputs if avals[slot].shape}
    mixed = _followed(program, mapped, batch)
    if mixed is not None:
        return Rows(batch, frozenset(mapped), mixed)
    for place, output in enumerate(program.outputs[:n_carry]):
        if output.__class__ is int and output not in mapped and output in program.definitions():
            return Rows(batch, frozenset(mapped), Mixing(program.definitions()[output], f"carry {place} is shared"))
    return Rows(batch, frozenset(mapped), None)


def _followed(program: Program, mapped: set[int], batch: int) -> Mixing | None:
    """Add to ``mapped`` what has a row per sequence; returns the first equation that mixes them."""
    for equation in program.equations:
        if not any(slot in mapped for slot in equation.reads()):
            continue
        why = mixing(program, equation, mapped)
        if not why and any(program.avals[slot].shape[:1] != (batch,) for slot in equation.outputs):
            why = f"a result of shape {program.avals[equation.outputs[0]].shape} has other rows"
        if why:
            return Mixing(equation, why)
        mapped.update(equation.outputs)
    return None


def common_batch(program: Program, n_carry: int) -> int | None:
    """The length of axis 0 that carry and inputs share; inputs of one number a step are the same for all rows."""
    avals = program.avals
    leading = {avals[slot].shape[:1] for k, slot in enumerate(program.inputs) if avals[slot].shape or k < n_carry}
    found = leading.pop() if len(leading) == 1 else ()
    return found[0] if found else None


class _Loop:
    name = "loop"


_LOOP: Any = _Loop()


def mixing(program: Program, equation: Equation, mapped: set[int]) -> str:
    """Nothing, or why axis 0 of the outputs is not axis 0 of the mapped operands."""
    name = equation.primitive.name
    rule = _RULES.get(name)
    if rule is None:
        if not equation.primitive.is_elementwise:
            return f"no rule tells how {name} treats rows"
        rule = _elementwise
    return rule(program, equation, mapped)


Rule = Callable[[Program, Equation, "set[int]"], str]


def _elementwise(program: Program, equation: Equation, mapped: set[int]) -> str:
    rank = len(program.avals[equation.outputs[0]].shape)
    for slot in equation.reads():
        if slot in mapped and len(program.avals[slot].shape) != rank:
            return f"broadcasting moves the batch axis of a value of shape {program.avals[slot].shape}"
    return ""


def _matmul(program: Program, equation: Equation, mapped: set[int]) -> str:
    left, right = equation.operands
    a, b = program.avals[left].shape, program.avals[right].shape
    if left in mapped and right in mapped:
        return "" if len(a) == len(b) and len(a) > 2 else "a product of two batches contracts over rows"
    if left in mapped:
        return "" if len(b) == 2 or (len(b) <= len(a) and len(a) > 2) else "the batch axis moves"
    return "" if len(b) > 2 and len(a) <= len(b) else "a product over the rows"


def _along_axes(program: Program, equation: Equation, mapped: set[int]) -> str:
    axes = equation.params["axis"]
    axes = axes if isinstance(axes, tuple) else (axes,)
    rank = len(program.aval(equation.operands[0]).shape)
    if None in axes or any(axis % rank == 0 for axis in axes):
        return f"{equation.primitive.name} over the batch axis"
    return _all_mapped(program, equation, mapped)


def _all_mapped(program: Program, equation: Equation, mapped: set[int]) -> str:
    ranks = {len(program.avals[slot].shape) for slot in equation.reads()}
    return "" if len(ranks) == 1 else "operands of different ranks"


def _keeps_first(program: Program, equation: Equation, mapped: set[int]) -> str:
    before = program.aval(equation.operands[0]).shape
    after = program.avals[equation.outputs[0]].shape
    if not after or after[0] != before[0]:
        return f"{equation.primitive.name} from {before} to {after} gives the batch axis up"
    if equation.primitive.name in {"sum_to", "broadcast_to"} and len(before) != len(after):
        return "the batch axis moves"
    return ""


def _transpose(program: Program, equation: Equation, mapped: set[int]) -> str:
    rank = len(program.aval(equation.operands[0]).shape)
    axes = equation.params["axes"]
    return "" if len(axes) < rank or axes[0] % rank == 0 else "the transposed batch axis"


def _getitem(program: Program, equation: Equation, mapped: set[int]) -> str:
    template = equation.params["template"]
    if len(equation.operands) > 1:
        return "an index made of arrays"
    if template and template[0] == ("slice", None, None, None):
        return ""
    rank = len(program.aval(equation.operands[0]).shape)
    if template and template[0] is Ellipsis and sum(item is not None for item in template[1:]) < rank:
        return ""
    return "an index into the batch axis"


def _put(program: Program, equation: Equation, mapped: set[int]) -> str:
    template = equation.params["template"]
    rank = len(equation.params["shape"])
    if len(equation.operands) > 1:
        return "an index made of arrays"
    if template and template[0] == ("slice", None, None, None):
        return ""
    if template and template[0] is Ellipsis and sum(item is not None for item in template[1:]) < rank:
        return ""
    return "an index into the batch axis"


def _take(program: Program, equation: Equation, mapped: set[int]) -> str:
    table, indices = equation.operands
    if table in mapped:
        return (
            "take from a batch"
            if indices in mapped or equation.params["axis"] == -len(program.avals[table].shape)
            else ""
        )
    return "" if equation.params["axis"] == -len(program.avals[table].shape) else "take along an inner axis"


def _untake(program: Program, equation: Equation, mapped: set[int]) -> str:
    g, indices = equation.operands
    inner = equation.params["axis"] != -len(equation.params["shape"])
    return "" if g in mapped and indices not in mapped and inner else "rows are added up at an index"


def _along_pairs(program: Program, equation: Equation, mapped: set[int]) -> str:
    shapes = [program.aval(operand).shape for operand in equation.operands]
    if shapes[0][:1] != shapes[1][:1] or len(shapes[0]) != len(shapes[1]):
        return "operands with other rows"
    return "" if equation.params["axis"] % len(shapes[0]) else f"{equation.primitive.name} along the batch axis"


def _last(program: Program, equation: Equation, mapped: set[int]) -> str:
    return "" if len(program.aval(equation.operands[0]).shape) > 1 else f"{equation.primitive.name} over the batch axis"


def _inner_scan(program: Program, equation: Equation, mapped: set[int]) -> str:
    """The proof for the body of an inner loop whose batch has been moved to the front (batch_first.py)."""
    body, n_carry, lead = equation.params["body"], equation.params["n_carry"], equation.params["lead"]
    n_inputs = len(body.inputs)
    rowed = {*body.inputs[:n_carry], *(slot for slot, at in zip(body.inputs[n_carry:], lead, strict=True) if at)}
    if any(o in mapped and s not in rowed for s, o in zip(body.inputs, equation.operands, strict=False)):
        return "a scan over the rows of a batch"
    leading = {body.avals[slot].shape[:1] for slot in rowed}
    leading |= {program.aval(o).shape[:1] for o in equation.operands if o in mapped}
    if len(leading) != 1 or not (batch := leading.pop()):
        return "carry and inputs of a scan have no common batch axis"
    inside = rowed | {s for s, o in zip(body.captures, equation.operands[n_inputs:], strict=True) if o in mapped}
    found = _followed(body, inside, batch[0])
    if found is not None:
        return f"{found.why} in a scan"
    made = body.definitions()
    shared = [k for k, o in enumerate(body.outputs) if o not in inside and (k >= n_carry or o in made)]
    return f"result {shared[0]} of a scan is shared" if shared else ""


def _scan(program: Program, equation: Equation, mapped: set[int]) -> str:
    return "an inner loop over rows, or with rows that mix in it or share its carry"  # batch_first.py left it as it is


def _unary(program: Program, equation: Equation, mapped: set[int]) -> str:
    return ""


_RULES: dict[str, Rule] = {
    "matmul": _matmul,
    "reshape": _keeps_first,
    "broadcast_to": _keeps_first,
    "sum_to": _keeps_first,
    "transpose": _transpose,
    "getitem": _getitem,
    "put": _put,
    "take": _take,
    "astype": _unary,
    "alias": _unary,
    "stop_gradient": _unary,
    "stop_nan": _unary,
    "one_hot": _unary,
    "untake": _untake,
    "take_along_axis": _along_pairs,
    "untake_along_axis": _along_pairs,
    "prod": _last,
    "inner_scan": _inner_scan,
    "scan": _scan,
}
_RULES |= dict.fromkeys(("concatenate", "split", "flip", "roll", "cumsum", "sum", "max", "min", "norm", "argmax",
                         "argmin", "logsumexp", "softmax", "log_softmax"), _along_axes)  # fmt: skip
