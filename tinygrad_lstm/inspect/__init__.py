"""Looking inside: equations of a cell, drawings, gradients over time, a player of BPTT, tables of a tape.

Everything here reads a tape or a Program; nothing knows any particular cell.  Names of gates come from ``tg.name``.
"""

from tinygrad_lstm.inspect.equations import equations
from tinygrad_lstm.inspect.table import Table

__all__ = ["Table", "equations"]
