"""Drawings of graphs: SVG and DOT as text of our own, PNG and PDF through matplotlib."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from tinygrad_lstm.errors import ArgumentError, DTypeError
from tinygrad_lstm.inspect.figures import blank_figure, picture
from tinygrad_lstm.inspect.graph import Box, Graph, graph_of
from tinygrad_lstm.inspect.layout import Layout, layout
from tinygrad_lstm.serialization import replacing

__all__ = ["draw"]

MOST = 600  # boxes that are laid out here
TITLE, SMALL, LINE, PAD, MARGIN = 12.0, 9.5, 13.0, 8.0, 12.0
FILL = {
    "input": "#d9ead3", "parameter": "#fce5cd", "constant": "#eeeeee", "op": "#ffffff", "named": "#cfe2f3",
    "output": "#ead1dc",
}  # fmt: skip
STROKE = "#555555"
ENDINGS = (".svg", ".dot", ".gv", ".png", ".pdf")


def draw(obj: Any, path: str | os.PathLike[str], *, x: Any = None, module: Any = None) -> None:
    """Draw a computation: operations with their names and shapes, and what goes where.

    Named values are blue, parameters orange, inputs green, results pink.

    Parameters
    ----------
    obj : Tape, Program, cell, Module or Tensor
        Of a cell one step is drawn, of a Module one call, of a Tensor what it was made of.
    path : path
        The ending decides: ``.svg``; ``.dot`` or ``.gv`` (for Graphviz); ``.png`` or ``.pdf`` (needs matplotlib).
    x : tree of arrays
        An example of the input: needed for a Module, rarely for a cell.
    module : Module, optional
        Whose parameters' names to show in the drawing of a Tape or a Tensor.

    Raises
    ------
    ArgumentError
        Another ending; more than 600 operations (in ``.dot`` there may be any number); a Module without ``x``.
    DTypeError, GraphError
        Nothing that can be drawn; a tensor without a graph, or one that was freed.
    FileError
        The file could not be written.  An old one is then still there.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from tinygrad_lstm import inspect, nn
    >>> path = pathlib.Path(tempfile.mkdtemp(), "gru.svg")
    >>> inspect.draw(nn.GRUCell(2, 3), path)
    >>> path.read_text(encoding="utf-8").startswith("<svg")
    True
    """
    if not isinstance(path, (str, os.PathLike)):
        raise DTypeError(f"draw: a path is a str or path-like, found {type(path).__name__}")
    ending = Path(os.fspath(path)).suffix.lower()
    if ending not in ENDINGS:
        raise ArgumentError(f"draw: {os.fspath(path)!r} ends in {ending!r}; drawings end in {', '.join(ENDINGS)}")
    graph = graph_of(obj, x, module)
    if ending in (".dot", ".gv"):
        data = dot(graph).encode()
    elif len(graph.boxes) > MOST:
        raise ArgumentError(
            f"draw: {len(graph.boxes)} boxes, at most {MOST} can be laid out; draw one cell, or fewer steps, "
            "or write .dot for Graphviz"
        )
    elif ending == ".svg":
        data = svg(graph).encode()
    else:
        data = _by_matplotlib(graph, ending[1:])
    with replacing(path) as file:
        file.write(data)


# ---------------------------------------------------------------------------- text


def _size(box: Box) -> tuple[float, float]:
    """Width and height of a box, from the widths that sans-serif letters have on average."""
    width = max([0.62 * TITLE * len(box.title), *(0.56 * SMALL * len(line) for line in box.lines)])
    return round(width + 2 * PAD, 1), round(LINE * (1 + len(box.lines)) + PAD, 1)


def _laid_out(graph: Graph) -> Layout:
    return layout([_size(box) for box in graph.boxes], [(arrow.start, arrow.end) for arrow in graph.arrows])


def svg(graph: Graph) -> str:
    """The drawing as SVG; where an operation comes from shows when the pointer rests on it."""
    plan = _laid_out(graph)
    width, height = plan.width + 2 * MARGIN, plan.height + 2 * MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{-MARGIN:g} {-MARGIN:g} {width:.1f} {height:.1f}" font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{STROKE}"/></marker></defs>',
        f'<rect x="{-MARGIN:g}" y="{-MARGIN:g}" width="{width:.1f}" height="{height:.1f}" fill="#ffffff"/>',
    ]
    for arrow, route in zip(graph.arrows, plan.routes, strict=True):
        curve = " ".join(
            f"{command}{' '.join(f'{px:.1f},{py:.1f}' for px, py in points)}" for command, points in _curve(route)
        )
        out.append(f'<path d="{curve}" fill="none" stroke="{STROKE}" stroke-width="1" marker-end="url(#end)"/>')
        if arrow.label:
            px, py = route[-1]
            out.append(f'<text x="{px + 5:.1f}" y="{py - 5:.1f}" font-size="8">{arrow.label}</text>')
    for box, (cx, cy) in zip(graph.boxes, plan.centres, strict=True):
        w, h = _size(box)
        round_ = 5 if box.kind in ("op", "named") else h / 2
        out.append(f"<g>{f'<title>{escape(box.note)}</title>' if box.note else ''}")
        out.append(
            f'<rect x="{cx - w / 2:.1f}" y="{cy - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{round_:.1f}" '
            f'fill="{FILL[box.kind]}" stroke="{STROKE}"/>'
        )
        for (text, size, weight), y in zip(_texts(box), _baselines(box, cy), strict=True):
            at = f'x="{cx:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="middle"{weight}'
            out.append(f"<text {at}>{escape(text)}</text>")
        out.append("</g>")
    return "\n".join([*out, "</svg>"]) + "\n"


def _texts(box: Box) -> list[tuple[str, float, str]]:
    bold = "" if box.kind == "op" else ' font-weight="bold"'
    return [(box.title, TITLE, bold), *((line, SMALL, ' fill="#444444"') for line in box.lines)]


def _baselines(box: Box, cy: float) -> list[float]:
    top = cy - _size(box)[1] / 2 + PAD / 2
    return [top + LINE * (k + 0.8) for k in range(1 + len(box.lines))]


def _curve(route: list[tuple[float, float]]) -> list[tuple[str, list[tuple[float, float]]]]:
    """A route as moves (M), straight lines (L, past the boxes of a layer) and cubic curves (C, between layers)."""
    parts = [("M", [route[0]])]
    for k in range(1, len(route)):
        (ax, ay), (bx, by) = route[k - 1], route[k]
        middle = (ay + by) / 2
        parts.append(("L", [(bx, by)]) if k % 2 == 0 else ("C", [(ax, middle), (bx, middle), (bx, by)]))
    return parts


def dot(graph: Graph) -> str:
    """The graph in the language of Graphviz."""
    lines = ["digraph tape {", '  node [fontname="Helvetica", fontsize=11, style="filled,rounded", shape=box];']
    for k, box in enumerate(graph.boxes):
        label = "\\n".join(text.replace("\\", "\\\\").replace('"', '\\"') for text in (box.title, *box.lines))
        tip = box.note.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'  n{k} [label="{label}", fillcolor="{FILL[box.kind]}", tooltip="{tip}"];')
    for arrow in graph.arrows:
        label = f' [label="{arrow.label}", fontsize=8]' if arrow.label else ""
        lines.append(f"  n{arrow.start} -> n{arrow.end}{label};")
    return "\n".join([*lines, "}"]) + "\n"


# ---------------------------------------------------------------------------- matplotlib


def _by_matplotlib(graph: Graph, kind: str) -> bytes:
    figure = blank_figure("draw", 1.0, 1.0)
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Curve

    plan = _laid_out(graph)
    width, height = plan.width + 2 * MARGIN, plan.height + 2 * MARGIN
    figure.set_size_inches(width / 72, height / 72)  # one unit is one point
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-MARGIN, plan.width + MARGIN), ylim=(plan.height + MARGIN, -MARGIN))
    axes.set_axis_off()
    codes = {"M": [Curve.MOVETO], "L": [Curve.LINETO], "C": [Curve.CURVE4] * 3}
    for arrow, route in zip(graph.arrows, plan.routes, strict=True):
        parts = _curve(route)
        curve = Curve([point for _, points in parts for point in points], [c for part, _ in parts for c in codes[part]])
        axes.add_patch(FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=7, color=STROKE, linewidth=0.8))
        if arrow.label:
            axes.text(route[-1][0] + 5, route[-1][1] - 5, arrow.label, fontsize=8)
    for box, (cx, cy) in zip(graph.boxes, plan.centres, strict=True):
        w, h = _size(box)
        rounded = f"round,pad=0,rounding_size={5 if box.kind in ('op', 'named') else h / 2}"
        patch = FancyBboxPatch(
            (cx - w / 2, cy - h / 2), w, h, boxstyle=rounded, facecolor=FILL[box.kind], edgecolor=STROKE, linewidth=0.8
        )
        axes.add_patch(patch)
        for (text, size, weight), y in zip(_texts(box), _baselines(box, cy), strict=True):
            bold = "bold" if "bold" in weight else "normal"
            axes.text(cx, y, text, fontsize=size, ha="center", va="baseline", fontweight=bold, parse_math=False)
    return picture(figure, kind, dpi=144)
