"""The text of a compiled loop as it is written: lines, kernels by content, and loops over the axes of views."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinygrad_lstm.compiler.views import View

__all__ = ["Writer", "collapsed", "nested"]


class Writer:
    """Collects the text of a module: kernels by content, and lines."""

    def __init__(self) -> None:
        self.kernels: dict[str, str] = {}
        self.lines: list[str] = []
        self.indent = 0
        self._names = 0

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def kernel(self, text: str) -> str:
        """The name of a kernel with this definition."""
        return self.kernels.setdefault(text, f"k{len(self.kernels)}")

    def fresh(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def address(self, view: View, row: str) -> str:
        """The address of a view's first element in a row."""
        parts = [f"b_{view.root.name}"]
        if view.rowed:
            parts.append(f"{row} * r_{view.root.name}")
        if view.offset:
            parts.append(str(view.offset))
        return " + ".join(parts)


def nested(
    writer: Writer, shape: Sequence[int], addresses: Sequence[str], strides: Sequence[Sequence[int]],
    body: Callable[[list[str]], None],
) -> None:  # fmt: skip
    """Loops over ``shape``; the body gets every address moved to where the loops are."""
    indices = []
    start = writer.indent
    for n in shape:
        index = writer.fresh("j")
        indices.append((index, n))
        if n != 1:
            writer.line(f"for {index} in range({n}):")
            writer.indent += 1
    moved = []
    for address, steps in zip(addresses, strides, strict=True):
        terms = [address]
        terms += [f"{index} * {step}" for (index, n), step in zip(indices, steps, strict=True) if step and n != 1]
        moved.append(" + ".join(terms))
    body(moved)
    writer.indent = start


def collapsed(
    shape: Sequence[int], strides: Sequence[Sequence[int]], last_fixed: bool = False
) -> tuple[list[int], list[list[int]]]:
    """Neighbouring axes that lie one behind the other in every operand, as one axis."""
    axes = [(n, [s[k] for s in strides]) for k, n in enumerate(shape) if n != 1 or (last_fixed and k == len(shape) - 1)]
    merged: list[tuple[int, list[int]]] = []
    for k in range(len(axes) - 1, -1, -1):
        n, steps = axes[k]
        may = merged and not (last_fixed and len(merged) == 1)
        if may and all(step == inner * merged[0][0] for step, inner in zip(steps, merged[0][1], strict=True)):
            merged[0] = (n * merged[0][0], merged[0][1])
        else:
            merged.insert(0, (n, steps))
    if not merged:
        merged = [(1, [0] * len(strides))]
    return [n for n, _ in merged], [[steps[k] for _, steps in merged] for k in range(len(strides))]
