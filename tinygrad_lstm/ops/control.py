"""scan: a loop over the leading axis whose body is recorded once."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.calls import misfit
from tinygrad_lstm.compiler.report import op_by_op, publish, stepwise
from tinygrad_lstm.compiler.schedule import Memory, check_memory, who_asks
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError, TraceError
from tinygrad_lstm.operands import together
from tinygrad_lstm.ops.elementwise import equal, where
from tinygrad_lstm.ops.indexing import take
from tinygrad_lstm.ops.lengths import check_lengths, valid_steps
from tinygrad_lstm.ops.loop import bind_scan, canonical
from tinygrad_lstm.ops.reduction import argmax, max
from tinygrad_lstm.ops.segments import memory_plan
from tinygrad_lstm.ops.shape import broadcast_to, reshape, stack, stop_gradient, stop_nan
from tinygrad_lstm.primitive import Aval, zeros
from tinygrad_lstm.record import note_parts, note_selected
from tinygrad_lstm.tape import recording, state
from tinygrad_lstm.tensor import Tensor, asarray, tensor
from tinygrad_lstm.tree import LEAF, TreeDef, describe, flatten, leaf_paths, unflatten

__all__ = ["memory_plan", "scan"]

_TENSOR = frozenset({Tensor})
Body = Callable[[Any, Any], tuple[Any, Any]]
_DRAW_BEFORE = "draw them before the loop and pass them as a part of xs (a cell: by a method noise(steps, batch))"


def scan(
    body: Body,
    init: Any,
    xs: Any,
    *,
    length: int | None = None,
    lengths: Any = None,
    reverse: bool = False,
    memory: Any = None,
) -> tuple[Any, Any]:
    """Loop over time: ``carry, y = body(carry, x)`` for every step; returns ``(carry, ys)``.

    The body is recorded once, on tensors without data, and replayed; its gradient is the tape of all steps
    replayed in reverse.  Tensors that it closes over get gradients.  A body that needs values (``if`` on a
    tensor, ``item``) is called at every step instead: right, and slower.  Numbers that a recorded body draws with
    ``numpy.random`` would be the same at every step, which is warned of: draw them beforehand and pass them in xs.

    Parameters
    ----------
    body : callable
        ``(carry, x) -> (carry, y)`` on trees of tensors; carry keeps its structure, shapes and dtypes.
    init : tree
        The first carry.
    xs : tree or None
        Time is axis 0 of every leaf.  None needs ``length``.
    length : int, optional
        Number of steps T; must agree with xs.
    lengths : ints (B,), optional
        Steps per row, 0..T.  Batch is then axis 0 of every carry leaf and axis 1 of every leaf of xs and ys.
        For ``t >= lengths[b]`` the carry row is unchanged, the ys row is zero, and xs is not looked at: the
        body sees the first step of the sequence once more (of another one where the length is 0; ones, where this loop
        stands in the body of another), as a constant, beside the carry that it ended with, and nothing of what it
        computes from that is used, unless it lets other rows read this one.
    reverse : bool
        Run t = T-1 .. 0 (per row from its last valid step), writing ys at their original positions.
    memory : int or float, optional
        The most that is kept for the backward pass, in bytes (int) or as a fraction in (0, 1] of what is
        kept without a budget (float); None keeps everything.  It covers the residuals of the steps and the carries
        between segments, not xs, ys and their cotangents, which stay whole.  The backward pass runs segments of
        the loop again; :func:`memory_plan` says how many steps that is.  A gradient that is itself differentiated,
        and a scan inside of a body, keep everything; in a function given to ``tg.compile`` the budget holds.

    Returns
    -------
    (carry, ys) : trees
        Leaves of ys have time as axis 0.

    Raises
    ------
    ShapeError
        Leaves of different length, or a carry that changes its structure, shape or dtype.
    ArgumentError
        A memory budget that cannot be met (the message says what the least is), or one for a body that needs values.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import ops
    >>> total, partial = ops.scan(lambda c, x: (c + x, c + x), 0.0, np.arange(4.0, dtype=np.float32))
    >>> total.item(), partial.tolist()
    (6.0, [0.0, 1.0, 3.0, 6.0])
    """
    return scan_with(record_body, body, init, xs, length=length, lengths=lengths, reverse=reverse, memory=memory)


def scan_with(
    record: Callable[..., Recorded], body: Body, init: Any, xs: Any, *, length: Any = None, lengths: Any = None,
    reverse: bool = False, memory: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """:func:`scan` with a way to record the body that may know it already."""
    if not callable(body):
        raise DTypeError(f"scan: the body is a function (carry, x) -> (carry, y), found {type(body).__name__}")
    carry_leaves, carry_tree = leaves_of(init, "init")
    x_leaves, x_tree = leaves_of(xs, "xs")
    steps = _steps(x_leaves, xs, length)
    if memory is not None:
        memory = check_memory(memory, "scan")
    full_body = body
    if lengths is not None:
        checked = _checked(lengths, steps, (init, carry_leaves), (xs, x_leaves))
        valid = valid_steps(checked, steps)
        full_body = _masked(body)
        x_leaves = [*(_filled(leaf, valid, checked) for leaf in x_leaves), valid]
        x_tree = TreeDef(tuple, (), (x_tree, TreeDef("leaf", (), ())))
    if not state().eager or steps == 0:  # where no step runs, there is none to show, but gradients of zero
        try:
            return _recorded(record, full_body, carry_leaves, carry_tree, x_leaves, x_tree, steps, reverse, memory)
        except TraceError as error:
            if state().trace is not None:
                raise  # the enclosing recording needs the value as well
            if memory is not None and state().enabled:
                raise ArgumentError(
                    f"{who_asks(memory, 'scan')}: memory={memory!r} needs a body that is recorded once, and this one "
                    f"runs step by step ({error}); leave memory out, or use ops.where instead of values"
                ) from None
            publish(functools.partial(stepwise, error.with_traceback(None), steps))  # no frames are kept
    else:
        publish(op_by_op)
    return _stepwise(full_body, carry_leaves, carry_tree, x_leaves, x_tree, steps, reverse)


def leaves_of(tree: Any, what: str) -> tuple[list[Tensor], TreeDef]:
    """The leaves of a tree as tensors, and its structure."""
    if tree.__class__ is Tensor:
        return [tree], LEAF
    if tree.__class__ is tuple and _TENSOR.issuperset(map(type, tree)):
        return list(tree), _tuple_of(len(tree))
    leaves, treedef = flatten(tree)
    # An array to start from is copied: small, and then nobody else can write to what a record has saved.
    make = tensor if what == "init" else asarray
    return [leaf if isinstance(leaf, Tensor) else make(leaf) for leaf in leaves], treedef


@functools.cache
def _tuple_of(count: int) -> TreeDef:
    """The structure of a plain tuple of so many leaves."""
    return TreeDef(tuple, (), (LEAF,) * count)


def rebuilt(treedef: TreeDef, leaves: list[Any]) -> Any:
    """The tree of these leaves; the usual ones without a walk."""
    if treedef is LEAF:
        return leaves[0]
    if treedef is _tuple_of(len(leaves)):
        return tuple(leaves)
    return unflatten(treedef, leaves)


def _steps(leaves: list[Tensor], xs: Any, length: int | None) -> int:
    if length is not None:
        try:
            length = operator.index(length)
        except TypeError:
            raise DTypeError(f"scan: length is an int, found {length!r}") from None
        if length < 0:
            raise ArgumentError(f"scan: length is not negative, found {length}")
    for k, leaf in enumerate(leaves):
        shape = leaf.shape
        if not shape:
            raise ShapeError(f"scan: xs{leaf_paths(xs)[k]} is 0-d; time is axis 0 of every leaf")
        if length is None:
            length = shape[0]
        elif shape[0] != length:
            raise ShapeError(f"scan: xs{leaf_paths(xs)[k]} has {shape[0]} steps, expected {length}")
    if length is None:
        raise ArgumentError("scan: xs=None needs length=")
    return length


# ---------------------------------------------------------------------------- lengths


def _checked(
    lengths: Any, steps: int, carry: tuple[Any, Sequence[Tensor]], xs: tuple[Any, Sequence[Tensor]]
) -> Any:  # fmt: skip
    """``lengths`` as int64 (B,), with leaves that have such a batch; of carry and xs the tree and its leaves."""
    sizes: list[int] = []
    for what, (tree, leaves), axis in (("carry", carry, 0), ("xs", xs, 1)):
        for k, leaf in enumerate(leaves):
            fits = leaf.ndim > axis
            if not fits or (sizes and leaf.shape[axis] != sizes[0]):
                expected = f"a batch of {sizes[0]}" if fits else "a number per row"
                raise ShapeError(
                    "scan: with lengths, batch is axis 0 of every carry leaf and axis 1 of every leaf of xs; "
                    f"{what}{leaf_paths(tree)[k]} has shape {leaf.shape}, expected {expected}"
                )
            sizes.append(leaf.shape[axis])
    return check_lengths(lengths, steps, sizes[0] if sizes else np.size(lengths))


def _rows(valid: Tensor, like: Tensor) -> Tensor:
    return reshape(valid, (*valid.shape, *(1,) * (like.ndim - valid.ndim)))


def _filled(xs: Tensor, valid: Tensor, lengths: Any) -> Tensor:
    """A sequence with its padding replaced by something that the body is known to take.

    What a body computes in a padded row is selected away, and so are cotangents.  Still, a weight that it closes over
    sums over rows: there an infinite derivative times a cotangent of zero is NaN.  A number of our own (0: think of a
    logarithm; 1: of a normalisation) may be where the body is singular; a step that is run anyway is not.
    """
    if 0 in xs.shape[:2]:
        return xs
    first = stop_gradient(xs)[0]
    if isinstance(lengths, Tensor) or not lengths.all():
        first = _of_empty_too(first, asarray(lengths))
    return where(_rows(valid, xs), xs, first)


def _of_empty_too(first: Tensor, lengths: Tensor) -> Tensor:
    """First steps (B, ...), with that of a longest sequence in place of those that are empty."""
    neutral = np.ones((), first.dtype) if first.dtype.kind == "f" else np.zeros((), first.dtype)
    empty = equal(lengths, 0)
    current = state()
    if current.step is not None or (current.trace is not None and not current.trace.runs):
        # In the body of another loop, rows that read each other's values would keep it from being shared out.
        return where(_rows(empty, first), neutral, first)
    donors = where(empty, argmax(lengths), np.arange(lengths.size))
    # Where all sequences are empty, nothing that is computed counts, but the padding may be NaN.
    return where(equal(max(lengths), 0), neutral, take(first, donors, 0))


def _masked(body: Body) -> Body:
    """The body with the results of padded rows selected away: the carry stays, y is zero.

    So are cotangents of the carry that it reads there where they are NaN: of a derivative that is infinite, zero times
    it is.  Others are zero, but for a body in which one row reads another: these are as they should be.
    """

    def masked(carry: Any, x_and_valid: Any) -> tuple[Any, Any]:
        x, valid = x_and_valid
        old, old_tree = flatten(carry)
        read = [where(_rows(valid, o), o, stop_nan(o)) if o.dtype.kind == "f" else o for o in old]
        new_carry, y = _pair(body, unflatten(old_tree, read), x)
        new, carry_tree = flatten(new_carry)
        y_leaves, y_tree = flatten(y)
        tensors = together(*old, *new, *y_leaves)[len(old) :]
        kept = [where(_rows(valid, n), n, o) for n, o in zip(tensors, old, strict=False)]
        if state().eager:
            note_selected(kept)
        shown = []
        for leaf in tensors[len(new) :]:
            if not leaf.ndim or leaf.shape[0] != valid.shape[0]:
                raise ShapeError(
                    f"scan: with lengths, y has the batch ({valid.shape[0]}) as axis 0, found {leaf.shape}"
                )
            # A number takes the dtype of the leaf; an array would be a capture, made anew at every call of a layer.
            shown.append(where(_rows(valid, leaf), leaf, _ZERO.get(leaf.dtype.kind, 0)))
        return unflatten(carry_tree, kept), unflatten(y_tree, shown)

    return masked


_ZERO: dict[str, Any] = {"b": False, "f": 0.0}


# ---------------------------------------------------------------------------- recorded once


def _check_carry(new: list[Any], new_tree: TreeDef, old: list[Any], old_tree: TreeDef) -> None:
    if new_tree != old_tree:
        raise ShapeError(
            f"scan: the body returned a carry {describe(new_tree)}, expected {describe(old_tree)} as in init"
        )
    for k, (n, o) in enumerate(zip(new, old, strict=True)):
        if tuple(n.shape) != tuple(o.shape) or n.dtype != o.dtype:
            path = leaf_paths(unflatten(old_tree, old))[k]
            raise (ShapeError if tuple(n.shape) != tuple(o.shape) else DTypeError)(
                f"scan: carry{path} went in as {o.dtype}{list(o.shape)} and came back as {n.dtype}{list(n.shape)}; "
                "give init the shape and dtype that the body returns"
            )


def _results(
    new_carry: Any, y: Any, carry: list[Tensor], carry_tree: TreeDef
) -> tuple[list[Tensor], list[Tensor], TreeDef]:
    """The leaves of what a body returned, and the structure of y.  Python floats are as precise as the carry."""
    given, given_tree = flatten(new_carry)
    leaves, y_tree = flatten(y)
    tensors = together(*carry, *given, *leaves)[len(carry) :]
    new = tensors[: len(given)]
    _check_carry(new, given_tree, carry, carry_tree)
    return new, tensors[len(given) :], y_tree


def _pair(body: Body, carry: Any, x: Any) -> tuple[Any, Any]:
    """What the body returns: a carry and y."""
    try:
        result = body(carry, x)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise  # of what the body does
        raise misfit(error, "scan calls body(carry, x); this one", body, (carry, x), {}) from None
    if not isinstance(result, tuple) or len(result) != 2:
        found = f"{len(result)} values" if isinstance(result, (tuple, list)) else type(result).__name__
        if isinstance(result, Tensor):
            found = f"one Tensor of shape {result.shape}"
        raise DTypeError(f"scan: the body returns a pair (carry, y), found {found}; y may be None")
    return result


class Recorded:
    """A recorded scan body: everything about it that does not depend on values or on the number of steps."""

    def __init__(
        self, program: Any, captures: list[Tensor], n_carry: int, y_tree: TreeDef, read: Sequence[Tensor] = ()
    ) -> None:  # fmt: skip
        self.program = program
        self.captures = captures
        self.read = read  # tensors on whose values the program depends
        self.n_carry = n_carry
        self.y_tree = y_tree
        # Where the captures stand, if the program is right as long as they fit and no module is changed.
        self.entry: Any = None

    def run(
        self, carry: list[Tensor], xs: list[Tensor], captures: list[Tensor], steps: int, reverse: bool,
        memory: Memory = None,
    ) -> list[Any]:  # fmt: skip
        """The leaves of (carry, ys)."""
        if not self.program.outputs:
            return []
        n_ys = len(self.program.outputs) - self.n_carry
        return list(bind_scan(self.program, [*carry, *xs, *captures], self.n_carry, n_ys, steps, reverse, memory))


def record_body(body: Body, carry: list[Tensor], carry_tree: TreeDef, xs: list[Tensor], x_tree: TreeDef) -> Recorded:
    """Record a body on data-free tensors of the given shapes (the time axis of xs removed)."""
    from tinygrad_lstm.compiler.draws import drawn_once
    from tinygrad_lstm.trace import depends_on, trace

    trees: list[Any] = [None]

    def flat(*leaves: Tensor) -> list[Any]:
        c = unflatten(carry_tree, leaves[: len(carry)])
        x = unflatten(x_tree, leaves[len(carry) :])
        new_carry, y = _pair(body, c, x)
        new, ys, trees[0] = _results(new_carry, y, carry, carry_tree)
        return [*new, *ys]

    avals = [Aval(t.shape, t.dtype) for t in carry] + [Aval(t.shape[1:], t.dtype) for t in xs]
    if state().trace is None:
        with drawn_once(body, "the body of a loop", "every step", _DRAW_BEFORE):
            traced = trace(flat, avals, flat=True)
    else:  # whoever is recording looks at that
        traced = trace(flat, avals, flat=True)
    depends_on(traced.read)
    return Recorded(canonical(traced.program), traced.captures, len(carry), trees[0], traced.read)


def _recorded(
    record: Callable[..., Recorded],
    body: Body,
    carry: list[Tensor],
    carry_tree: TreeDef,
    xs: list[Tensor],
    x_tree: TreeDef,
    steps: int,
    reverse: bool,
    memory: Memory,
) -> tuple[Any, Any]:
    recorded = record(body, carry, carry_tree, xs, x_tree)
    outs = recorded.run(carry, xs, recorded.captures, steps, reverse, memory)
    return rebuilt(carry_tree, outs[: len(carry)]), rebuilt(recorded.y_tree, outs[len(carry) :])


# ---------------------------------------------------------------------------- step by step


def _stepwise(
    body: Body, carry: list[Tensor], carry_tree: TreeDef, xs: list[Tensor], x_tree: TreeDef, steps: int, reverse: bool
) -> tuple[Any, Any]:
    """The body called at every step, every op on the tape."""
    if steps == 0:
        return _no_steps(body, carry, carry_tree, xs, x_tree)
    current = unflatten(carry_tree, carry)
    rows: list[list[Tensor]] = []
    y_tree: Any = None
    outer = state().step  # of a loop in a body, provenance tells the step of the outer one
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        with recording(step=t if outer is None else outer):
            new_carry, y = _pair(body, current, unflatten(x_tree, [leaf[t] for leaf in xs]))
        new, leaves, y_tree = _results(new_carry, y, carry, carry_tree)
        if state().tapes:
            note_parts(new)
        current = unflatten(carry_tree, new)
        rows.append(leaves)
    if reverse:
        rows.reverse()
    return current, unflatten(y_tree, [stack(column) for column in zip(*rows, strict=True)])


def _no_steps(
    body: Body, carry: list[Tensor], carry_tree: TreeDef, xs: list[Tensor], x_tree: TreeDef
) -> tuple[Any, Any]:
    """No step ran: only the structure of y is needed, from a step on zeros that nobody sees."""
    with recording(enabled=False, tapes=(), names=None):
        zero_carry = unflatten(carry_tree, [zeros(Aval(c.shape, c.dtype)) for c in carry])
        zero_x = unflatten(x_tree, [zeros(Aval(x.shape[1:], x.dtype)) for x in xs])
        _, y = _pair(body, zero_carry, zero_x)
    leaves, y_tree = flatten(y)
    leaves = together(*carry, *leaves)[len(carry) :]
    empty = [broadcast_to(zeros(Aval((), leaf.dtype)), (0, *leaf.shape)) for leaf in leaves]
    return unflatten(carry_tree, carry), unflatten(y_tree, empty)
