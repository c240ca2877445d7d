"""matplotlib, where it is there: figures without a window system, as bytes."""

from __future__ import annotations

import io
from typing import Any

from tinygrad_lstm.errors import DependencyError
from tinygrad_lstm.hints import how_to_install

__all__ = ["blank_figure", "picture"]


def blank_figure(who: str, width: float, height: float) -> Any:
    """An empty Figure of that many inches.  Raises DependencyError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError(f"{who}: this needs matplotlib; {how_to_install('plots')}") from None
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def picture(figure: Any, kind: str, dpi: int = 120) -> bytes:
    """The figure as a file's content; without a date, so that equal figures make equal files."""
    from matplotlib import rc_context

    data = io.BytesIO()
    undated: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with rc_context({"svg.hashsalt": "tinygrad_lstm"}):
        figure.savefig(data, format=kind, dpi=dpi, metadata=undated.get(kind))
    return data.getvalue()
