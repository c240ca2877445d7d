"""Sequences of equal or different lengths, a loader that pads them into batches, windows of a series."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.calls import SaysWhatItTakes
from tinygrad_lstm.checks import check_int, check_number
from tinygrad_lstm.errors import ArgumentError, DTypeError, OutOfRangeError, ShapeError
from tinygrad_lstm.ops.random import check_generator
from tinygrad_lstm.random import Generator, default_generator

__all__ = ["Batch", "DataLoader", "SequenceDataset", "windows"]


class _Parts(NamedTuple):
    inputs: Any
    targets: Any
    lengths: Any


class Batch(_Parts):
    """What a :class:`DataLoader` yields: a tuple ``(inputs, targets, lengths)``.

    Parameters
    ----------
    inputs : array ``(T, B, ...)``, or ``(B, T, ...)`` with ``batch_first``
        Padded after each sequence's end.
    targets : array or None
        One per sequence, ``(B, ...)``; or one per step, laid out and padded like the inputs.
    lengths : int64 array ``(B,)``
        How many steps of each sequence are real.
    per_step, batch_first : bool, optional
        What the targets are and how they are laid out, for loaders of one's own; where it is not said, a
        :class:`Trainer <tinygrad_lstm.training.Trainer>` judges by the shapes.

    Examples
    --------
    >>> inputs, targets, lengths = batch = Batch(np.zeros((3, 2, 5)), np.zeros((3, 2)), np.array([3, 1]))
    >>> batch.mask.tolist()
    [[True, True], [True, False], [True, False]]
    """

    per_step: bool | None
    batch_first: bool | None

    def __new__(
        cls, inputs: Any, targets: Any, lengths: Any, *, per_step: bool | None = None, batch_first: bool | None = None
    ) -> Batch:
        self = super().__new__(cls, inputs, targets, lengths)
        self.per_step, self.batch_first = per_step, batch_first
        return self

    @property
    def mask(self) -> np.ndarray:
        """bool ``(T, B)``, or ``(B, T)`` with ``batch_first``: which steps are no padding."""
        steps = np.shape(self.inputs)[1 if self.batch_first else 0]
        return step_mask(self.lengths, steps, bool(self.batch_first))


def step_mask(lengths: Any, steps: int, batch_first: bool = False) -> np.ndarray:
    """bool ``(steps, B)``, or ``(B, steps)``: which steps of sequences of these lengths are no padding."""
    mask = np.arange(steps) < np.reshape(lengths, (-1, 1))
    return mask if batch_first else np.ascontiguousarray(mask.T)


class SequenceDataset(SaysWhatItTakes):
    """Sequences and, if wanted, a target for each.

    Parameters
    ----------
    inputs : list of arrays, or one array
        Sequence ``n`` is ``inputs[n]``, of shape ``(T_n, ...)``; everything after the time axis, and
        the dtype, is the same for all.
    targets : list or array of the same number of items, optional
        One value or array per sequence (a class, a vector), or with ``per_step`` one per step.
    per_step : bool, optional
        Whether the targets' first axis is time.  Without it: whether each target's first axis is as
        long as its sequence.  Say False where that is a coincidence (vectors of length T).

    Raises
    ------
    ShapeError
        Sequences or targets that do not fit together.
    ArgumentError
        No sequence at all.

    Examples
    --------
    >>> ds = SequenceDataset([np.zeros((3, 2)), np.zeros((5, 2))], targets=[0, 1])
    >>> len(ds), ds[1][0].shape, int(ds[1][1])
    (2, (5, 2), 1)
    """

    def __init__(
        self,
        inputs: Sequence[Any] | np.ndarray,
        targets: Sequence[Any] | np.ndarray | None = None,
        per_step: bool | None = None,
    ) -> None:
        self.inputs = _alike(inputs, "inputs", time_axis=True)
        self.lengths = np.array([len(x) for x in self.inputs], np.int64)
        self.targets: list[np.ndarray] | None = None
        self.per_step = False
        if targets is None:
            return
        if not hasattr(targets, "__len__") or isinstance(targets, (str, bytes)):
            raise DTypeError(f"targets are a list of arrays, or one array, found {targets!r:.60}")
        if len(targets) != len(self.inputs):
            raise ShapeError(f"{len(self.inputs)} sequences need as many targets, found {len(targets)}")
        arrays = [_array(t, f"targets[{n}]") for n, t in enumerate(targets)]
        fits = all(t.ndim > 0 and len(t) == n for t, n in zip(arrays, self.lengths, strict=True))
        self.per_step = fits if per_step is None else per_step
        if self.per_step and not fits:
            n = next(n for n, t in enumerate(arrays) if t.ndim == 0 or len(t) != self.lengths[n])
            raise ShapeError(
                f"targets[{n}] has shape {arrays[n].shape}, with per_step its first axis is the sequence's "
                f"{self.lengths[n]} steps"
            )
        self.targets = _alike(arrays, "targets", time_axis=self.per_step)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, n: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Sequence ``n`` and its target (None without targets)."""
        check_int("SequenceDataset: an index", n, None)
        if not -len(self) <= n < len(self):
            raise OutOfRangeError(f"sequence {n} of a dataset with {len(self)}")
        return self.inputs[n], None if self.targets is None else self.targets[n]


class DataLoader(SaysWhatItTakes):
    """Batches of sequences, padded to the longest of the batch, time-major, shuffled on request.

    Each ``for`` loop over the loader is one epoch.  :meth:`state_dict` taken between two batches,
    loaded into a loader like this one, makes the next loop go on with the batch that would have
    come next, with the same order and the same random numbers.

    Parameters
    ----------
    dataset : SequenceDataset
    batch_size : int
    shuffle : bool
        Draw a new order for every epoch.
    drop_last : bool
        Leave out a last batch that is smaller than the others.
    generator : tg.Generator, optional
        Where the order is drawn from; the default generator (``tg.seed``) without it.
    batch_first : bool
        Inputs (and targets per step) as ``(B, T, ...)`` in place of ``(T, B, ...)``.
    pad_value : number
        What fills the inputs after a sequence's end.
    target_pad_value : number, optional
        The same for targets per step; without it -100 for ints (the class that
        ``nn.losses.cross_entropy`` ignores; 0 for unsigned ones) and 0 for floats.  A Trainer keeps it
        from every loss; in a loop of one's own ``output[batch.mask], targets[batch.mask]`` does.

    Examples
    --------
    >>> loader = DataLoader(SequenceDataset([np.ones((3, 2)), np.ones((5, 2))], [0, 1]), batch_size=2)
    >>> inputs, targets, lengths = next(iter(loader))
    >>> inputs.shape, targets.tolist(), lengths.tolist()
    ((5, 2, 2), [0, 1], [3, 5])
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        batch_size: int = 32,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: Generator | None = None,
        batch_first: bool = False,
        pad_value: float = 0,
        target_pad_value: float | None = None,
    ) -> None:
        if not all(hasattr(dataset, name) for name in ("inputs", "targets", "lengths", "per_step")):
            raise DTypeError(
                f"DataLoader: the dataset is a {type(dataset).__name__}, expected a SequenceDataset; write "
                "DataLoader(SequenceDataset(sequences, targets))"
            )
        check_int("DataLoader: batch_size", batch_size)
        self.dataset = dataset
        self.batch_size = int(batch_size)
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.generator = check_generator("DataLoader", generator)
        self.batch_first = batch_first
        self.pad_value = _fitting(pad_value, "pad_value", dataset.inputs)
        self.target_pad_value = _fitting(target_pad_value, "target_pad_value", dataset.targets)
        self._epoch = 0
        self._position = 0
        self._order: np.ndarray | None = None
        self._resume = False

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        if self._resume and self._order is not None:
            self._resume = False
        else:
            n = len(self.dataset)
            generator = self.generator or default_generator()
            self._order = generator.permutation(n) if self.shuffle else np.arange(n)
            self._position = 0
        order = self._order
        for k in range(self._position, len(self)):
            # The position moves first: a state taken while the caller works on batch k names k + 1.
            self._position = k + 1
            if self._position == len(self):
                self._epoch, self._position, self._order = self._epoch + 1, 0, None
            yield self._collate(order[k * self.batch_size : (k + 1) * self.batch_size])

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: epoch, next batch, the epoch's order, the generator's state."""
        generator = self.generator or default_generator()
        order = None if self._order is None else self._order.copy()
        return {
            "epoch": self._epoch,
            "position": self._position,
            "order": order,
            "generator": generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a loader over the same data.

        Raises
        ------
        ArgumentError
            The state belongs to other data or to another batch size.
        """
        if not isinstance(state, Mapping) or not {"epoch", "position", "order", "generator"} <= state.keys():
            raise ArgumentError(
                "DataLoader.load_state_dict: this is no state of a DataLoader; pass what state_dict() gave"
            )
        order, position = state["order"], int(state["position"])
        if order is not None and (len(order) != len(self.dataset) or not 0 <= position < len(self)):
            raise ArgumentError(
                f"this state (batch {position} of {len(order)} sequences) belongs to other data: the loader has "
                f"{len(self.dataset)} sequences in {len(self)} batches"
            )
        (self.generator or default_generator()).set_state(state["generator"])
        self._epoch, self._position = int(state["epoch"]), position
        self._order = None if order is None else np.asarray(order)
        self._resume = order is not None

    def _collate(self, chosen: np.ndarray) -> Batch:
        data = self.dataset
        lengths = data.lengths[chosen]
        inputs = _padded([data.inputs[n] for n in chosen], lengths, self.pad_value, self.batch_first)
        if data.targets is None:
            return Batch(inputs, None, lengths, per_step=False, batch_first=self.batch_first)
        targets = [data.targets[n] for n in chosen]
        if not data.per_step:
            return Batch(inputs, np.stack(targets), lengths, per_step=False, batch_first=self.batch_first)
        pad = self.target_pad_value
        if pad is None:
            pad = -100 if targets[0].dtype.kind == "i" else 0
        padded = _padded(targets, lengths, pad, self.batch_first)
        return Batch(inputs, padded, lengths, per_step=True, batch_first=self.batch_first)


def windows(series: Any, length: int, horizon: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Every window of a series with what follows it: pairs for forecasting.

    Parameters
    ----------
    series : array ``(N,)`` or ``(N, ...)``
        Time is the first axis.
    length : int
        Steps of a window.
    horizon : int
        Steps after it that are to be predicted.

    Returns
    -------
    inputs : array ``(n, length, ...)``
    targets : array ``(n, horizon, ...)``
        ``n = N - length - horizon + 1``; both are copies in the series's dtype.

    Raises
    ------
    ShapeError
        The series is too short for one window.

    Examples
    --------
    >>> x, y = windows(np.arange(5), length=3, horizon=1)
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2], [1, 2, 3]], [[3], [4]])
    """
    array = _array(series, "windows: series")
    check_int("windows: length", length)
    check_int("windows: horizon", horizon)
    if array.ndim == 0 or len(array) < length + horizon:
        raise ShapeError(
            f"a series of shape {array.shape} is too short for a window of length {length} and a horizon of {horizon}"
        )
    both = np.lib.stride_tricks.sliding_window_view(array, length + horizon, axis=0)
    both = np.moveaxis(both, -1, 1)
    return both[:, :length].copy(), both[:, length:].copy()


def _array(item: Any, what: str) -> np.ndarray:
    try:
        return np.asarray(item)
    except ValueError:
        raise ShapeError(
            f"{what} is a {type(item).__name__} whose items differ in shape, expected one array; join them to one"
        ) from None


def _alike(items: Sequence[Any] | np.ndarray, what: str, time_axis: bool) -> list[np.ndarray]:
    """The items as arrays that agree in dtype and in shape (past the time axis)."""
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable) or not getattr(items, "ndim", 1):
        raise DTypeError(f"{what} are a list of arrays, or one array, found {items!r:.60}")
    arrays = [_array(item, f"{what}[{n}]") for n, item in enumerate(items)]
    if not arrays:
        raise ArgumentError(f"{what}: a dataset needs at least one sequence")
    skip = 1 if time_axis else 0
    first = arrays[0]
    for n, array in enumerate(arrays):
        if array.dtype.kind not in "biuf":
            raise DTypeError(f"{what}[{n}] has dtype {array.dtype}; sequences are arrays of numbers")
        if time_axis and array.ndim == 0:
            raise ShapeError(f"{what}[{n}] is a single number, expected an array (T, ...)")
        if array.shape[skip:] != first.shape[skip:] or array.dtype != first.dtype:
            raise ShapeError(
                f"{what}[{n}] has shape {array.shape} and dtype {array.dtype}, {what}[0] has {first.shape} and "
                f"{first.dtype}; " + ("only the first axis may differ" if time_axis else "they have to be alike")
            )
    return arrays


def _fitting(pad: Any, name: str, items: list[np.ndarray] | None) -> Any:
    """The number; raises unless the dtype of the arrays that it fills up has it."""
    if pad is None or not items:
        return pad
    if not isinstance(pad, (bool, np.bool_)):
        check_number(f"DataLoader: {name}", pad)
    dtype = items[0].dtype
    bounds = np.iinfo(dtype) if dtype.kind in "iu" else None
    if bounds is not None and not (bounds.min <= pad <= bounds.max and pad == int(pad)):
        raise ArgumentError(f"DataLoader: {name}={pad} is no {dtype}, which the sequences are")
    return pad


def _padded(items: list[np.ndarray], lengths: np.ndarray, pad: float, batch_first: bool) -> np.ndarray:
    """``(T, B, ...)`` (or ``(B, T, ...)``) with T the longest length."""
    steps, batch, rest = int(lengths.max()), len(items), items[0].shape[1:]
    shape = (batch, steps, *rest) if batch_first else (steps, batch, *rest)
    out = np.full(shape, pad, items[0].dtype)
    for b, item in enumerate(items):
        if batch_first:
            out[b, : len(item)] = item
        else:
            out[: len(item), b] = item
    return out
