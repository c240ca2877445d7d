"""A scan whose gradient may be asked for, as one straight function of tensors: the loop, its results, their record.

What :func:`.bind_site` finds out of a scan that it has run already is written down here.  For a layer of one row and
few steps, making the record of the loop takes as long as the loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.binding import MARK
from tinygrad_lstm.ops.prepared import Site, apart
from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.record import _STATE, Output, Record
from tinygrad_lstm.storage import guards_of
from tinygrad_lstm.tensor import Tensor

__all__ = ["Residuals", "linked"]


class Residuals:
    """What a forward scan keeps for its backward: arrays in a layout that nobody else sees."""

    __slots__ = ("arrays", "segments", "shared", "site")

    def __init__(self, site: Site, arrays: Sequence[np.ndarray] = (), shared: frozenset[int] = frozenset()) -> None:
        self.site = site
        self.arrays = arrays  # as the adjoint pair of the site lists them
        self.shared = shared  # outputs that have their memory in common with a residual
        self.segments: Any = None  # within a memory budget: what runs the loop piece by piece instead


def linked(primitive: Primitive, site: Site, lead: bool) -> Callable[..., tuple[Tensor, ...]]:
    """``call(*carry, *xs, *captures)``: tensors to tensors, linked to their record.

    For a site that was run before, where some operand requires a gradient and no Tape is open.  With ``lead`` the
    final carry has one more axis, of length 1, in front.
    """
    from tinygrad_lstm.compiler.runner import loop_call_in
    from tinygrad_lstm.compiler.straight import Form

    pair, plan = site.forward()
    params, avals = (site.led_params, site.led_avals) if lead else (site.params, site.avals)
    assert site.shared is not None
    head, tail = site.n_ys, site.n_ys + len(pair.residuals)
    names: dict[str, Any] = {
        "Tensor": Tensor, "Output": Output, "Record": Record, "Residuals": Residuals, "guards_of": guards_of,
        "apart": apart, "among": site.twins, "site": site, "shared": site.shared, "state": _STATE.get,
        "primitive": primitive, "params": params, "shape": avals[0].shape, "dtype": avals[0].dtype, "avals": avals,
        "getframe": sys._getframe, "MARK": MARK,
    }  # fmt: skip

    def lines(taken: Sequence[str], final: Sequence[str], outs: Sequence[str]) -> list[str]:
        ys, text = [*outs[:head], *outs[tail:]], []
        if site.twins:
            text.append(f"ys = apart([{', '.join(ys)}], among)")
            ys = [f"ys[{k}]" for k in range(len(ys))]
        made = [f"{part}[None]" for part in final] if lead else [*final]
        text += [f"o{k} = Tensor({array})" for k, array in enumerate([*made, *ys])]
        text += [f"o{k}._used = True" for k in sorted(site.shared or ())]
        operands = "".join(f"{name}, " for name in taken)
        stored = " or ".join(f"{name}._storage is not None" for name in taken)
        text += [f"{' = '.join(f'{name}._used' for name in taken)} = True"]
        node = "{0}._node or {0}"
        wanted = [f"({node}) if {{0}}._rg else None"] * site.n_carry + [node if yes else "None" for yes in site.wanted]
        parents = "".join(f"{parent.format(name)}, " for name, parent in zip(taken, wanted, strict=True))
        text += [
            "caller = getframe(1)",
            "while caller is not None and MARK in caller.f_globals: caller = caller.f_back",
            "record = Record(",
            f"    primitive, params, ({parents}), ({operands}Residuals(site, [{', '.join(outs[head:tail])}], shared)),",
            "    shape, dtype, None, avals, state().place,",
            "    *((None, -1) if caller is None else (caller.f_code, caller.f_lasti)),",
            ")",
            f"if {stored}: record.guards, record.marked = guards_of(({operands}))",
        ]
        for k, aval in enumerate(avals):
            text += [f"o{k}._node = Output(record, {k})", f"o{k}._rg = {aval.dtype.kind == 'f'}"]
        return [*text, f"return ({''.join(f'o{k}, ' for k in range(len(avals)))})"]

    return loop_call_in(Form("{}._data", lines, names), plan, site.reverse)
