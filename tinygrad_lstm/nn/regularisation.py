"""Noise made for recurrent nets: variational dropout, zoneout, dropped recurrent weights.

Masks are drawn for a whole sequence before its loop, so that they are the same step by step and recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.autodiff.standins import Filled
from tinygrad_lstm.checks import check_probability
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.nn.module import Module
from tinygrad_lstm.nn.recurrent import check_cell
from tinygrad_lstm.ops.random import check_generator, drawn, dropout_mask
from tinygrad_lstm.random import Generator, default_generator
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.tree import flatten, tree_map, unflatten

__all__ = ["VariationalDropout", "WeightDrop", "Zoneout"]


class VariationalDropout(Module):
    """Dropout with one mask per sequence, the same at every step (Gal & Ghahramani 2016).

    Parameters
    ----------
    p : float in [0, 1]
    batch_first : bool
        x is ``(B, T, ...)`` instead of ``(T, B, ...)``.
    generator : Generator, optional

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> y = nn.VariationalDropout(0.5)(np.ones((4, 2, 3), np.float32)).numpy()
    >>> bool((y == y[0]).all())
    True
    """

    def __init__(self, p: float = 0.5, batch_first: bool = False, generator: Generator | None = None) -> None:
        super().__init__()
        self.p, self.batch_first = check_probability("VariationalDropout", p), batch_first
        self.generator = check_generator("VariationalDropout", generator)

    def forward(self, x: Any) -> Tensor:
        """Same shape; x itself in evaluation."""
        x = asarray(x)
        if x.ndim < 3:
            raise ShapeError(f"VariationalDropout: x has shape {x.shape}, expected time, batch and features")
        if not self.training or self.p == 0.0:
            return x
        shape = list(x.shape)
        shape[1 if self.batch_first else 0] = 1
        return x * dropout_mask(tuple(shape), self.p, x.dtype, self.generator)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"p={self.p}"


class Zoneout(Module):
    """A cell whose state parts keep, at random, elements of the step before (Krueger et al. 2017).

    In training each element of a new state is replaced by the old one with probability p; in evaluation the
    state is the expectation ``p * old + (1 - p) * new``.

    Parameters
    ----------
    cell : a cell
    p : float, or one per part of the state
        For an LSTM ``(p_h, p_c)``.
    generator : Generator, optional

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> layer = nn.Recurrent(nn.Zoneout(nn.LSTMCell(3, 5), p=(0.1, 0.3)))
    >>> layer(np.ones((7, 2, 3), np.float32))[0].shape
    (7, 2, 5)
    """

    def __init__(self, cell: Any, p: float | Sequence[float] = 0.1, generator: Generator | None = None) -> None:
        super().__init__()
        check_cell(cell, "Zoneout")
        parts = len(flatten(cell.initial_state(1))[0])
        rates = list(p) if isinstance(p, Sequence) else [p] * parts
        if len(rates) != parts:
            raise ArgumentError(f"Zoneout: {len(rates)} probabilities for a state of {parts} parts")
        self.cell, self.generator = cell, check_generator("Zoneout", generator)
        self.p = tuple(check_probability("Zoneout", rate) for rate in rates)

    def initial_state(self, batch: int) -> Any:
        """That of the cell."""
        return self.cell.initial_state(batch)

    def noise(self, steps: int, batch: int) -> Any:
        """For all steps, where each part of the state stays as it was: bool ``(T, B, ...)``; None in evaluation."""
        if not self.training:
            return None
        generator = self.generator or default_generator()
        leaves = flatten(self.cell.initial_state(batch))[0]
        shapes = [(steps, *leaf.shape) for leaf in leaves]
        return [
            drawn(lambda rate=rate, shape=shape: ~generator.keep_mask(rate, shape), shape, np.bool_)  # type: ignore[misc]
            for rate, shape in zip(self.p, shapes, strict=True)
        ]

    def forward(self, x: Any, state: Any, stays: Any = None) -> tuple[Any, Any]:
        """One step; ``stays`` is one step of :meth:`noise` (drawn here without it)."""
        if stays is None and self.training:
            stays = [mask[0] for mask in self.noise(1, flatten(state)[0][0].shape[0])]
        output, fresh = self.cell(x, state)
        old = flatten(state)[0]
        new, treedef = flatten(fresh)
        if stays is None:
            mixed = [rate * o + (1.0 - rate) * n for rate, o, n in zip(self.p, old, new, strict=True)]
        else:
            mixed = [ops.where(mask, o, n) for mask, o, n in zip(stays, old, new, strict=True)]
        swapped = {id(before): after for before, after in zip(new, mixed, strict=True)}
        # Where the output is a part of the state, it is the part that the next step will see.
        return tree_map(lambda leaf: swapped.get(id(leaf), leaf), output), unflatten(treedef, mixed)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"p={self.p}"


class WeightDrop(Module):
    """Dropout on the weights of a layer, one mask per call (Wan et al. 2013; Merity, Keskar & Socher 2018).

    Parameters
    ----------
    layer : Module
    names : list of str, optional
        Parameters of the layer; by default the recurrent weights (``weight_hh...``).
    p : float in [0, 1]
    generator : Generator, optional

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> layer = nn.WeightDrop(nn.LSTM(3, 5), p=0.5)
    >>> layer(np.ones((7, 2, 3), np.float32))[0].shape
    (7, 2, 5)
    """

    def __init__(
        self, layer: Module, names: Sequence[str] | None = None, p: float = 0.5, generator: Generator | None = None
    ) -> None:
        super().__init__()
        if not isinstance(layer, Module):
            raise DTypeError(f"WeightDrop: the layer is a Module, found {layer!r:.60}")
        known = dict(layer.named_parameters())
        if isinstance(names, (int, float, str)):
            raise DTypeError(f"WeightDrop: names are a list of str, found {names!r}; the probability is p={names!r}")
        if names is None:
            names = [name for name in known if name.rpartition(".")[2].startswith("weight_hh")]
        wrong = [name for name in names if name not in known]
        if wrong or not names:
            raise ArgumentError(f"WeightDrop: no parameters named {wrong or 'weight_hh...'}; there are {list(known)}")
        self.layer, self.names, self.generator = layer, list(names), check_generator("WeightDrop", generator)
        self.p = check_probability("WeightDrop", p)

    @property
    def returns_state(self) -> bool:
        """As the layer's."""
        return getattr(self.layer, "returns_state", False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns."""
        if not self.training or self.p == 0.0:
            return self.layer(*args, **kwargs)
        own = self.layer.__tree_leaves__()
        dropped = {name: ops.dropout(own[name], self.p, self.generator) for name in self.names}
        with Filled(self.layer, dropped):
            return self.layer(*args, **kwargs)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{', '.join(self.names)}, p={self.p}"
