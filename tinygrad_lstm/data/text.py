"""Text as a stream of characters, cut for truncated backpropagation through time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tinygrad_lstm.checks import check_int, check_number
from tinygrad_lstm.errors import ArgumentError, DTypeError, OutOfRangeError, ShapeError
from tinygrad_lstm.tensor import read

__all__ = ["TextCorpus", "TextStreams"]


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """The text in a file; line ends become ``\\n`` and a byte-order mark is dropped.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ArgumentError
        It is not text in this encoding.
    """
    with open(path, "rb") as file:
        raw = file.read()
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{os.fspath(path)} is not text in {encoding}: byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from None
    except LookupError:
        raise ArgumentError(f"there is no encoding called {encoding!r}") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


class TextCorpus:
    """A text, its vocabulary of characters, and its split into a training and a held-out part.

    Both parts are contiguous: the held-out part is the end of the text, so that nothing of it was
    seen in training.  The vocabulary is that of the whole text, sorted by code point.

    Parameters
    ----------
    text : str
    held_out : float
        The fraction of the characters that is held out, between 0 and 1 (both excluded).
    name : str
        What messages call the text.

    Attributes
    ----------
    text : str
    vocabulary : str
        Each character once; a character's id is its position here.
    train, held_out : int64 arrays
        The ids of the two parts.
    sha256 : str
        Of the text in UTF-8, in hexadecimal.
    path : str or None
        The file that the text came from.

    Raises
    ------
    ArgumentError
        An empty text, or one too short to be split.

    Examples
    --------
    >>> corpus = TextCorpus("abracadabra", held_out=0.2)
    >>> corpus.vocabulary, corpus.encode("cab").tolist()
    ('abcdr', [2, 0, 1])
    >>> corpus.decode(corpus.train), corpus.decode(corpus.held_out)
    ('abracadab', 'ra')
    """

    def __init__(self, text: str, held_out: float = 0.05, name: str = "the text") -> None:
        if not isinstance(text, str):
            raise DTypeError(f"text is a str, found {type(text).__name__}")
        check_number("held_out", held_out)
        if not 0 < held_out < 1:
            raise ArgumentError(f"held_out is a fraction between 0 and 1, found {held_out}")
        if not text:
            raise ArgumentError(f"{name} is empty")
        self.text = text
        self.name = name
        self.path: str | None = None
        self.vocabulary = "".join(sorted(set(text)))
        self.sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        ids = encode(text, self.vocabulary)
        cut = len(ids) - round(len(ids) * held_out)
        if cut < 2 or len(ids) - cut < 2:
            raise ArgumentError(
                f"{name} is too short: {len(ids)} characters cannot be split into a training and a held-out part"
            )
        self.train, self.held_out = ids[:cut], ids[cut:]

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], held_out: float = 0.05, encoding: str = "utf-8") -> TextCorpus:
        """The corpus in a text file; line ends become ``\\n`` and a byte-order mark is dropped.

        Raises
        ------
        OSError
            The file is missing or cannot be read.
        ArgumentError
            It is empty, too short, or not text in this encoding.
        """
        text = read_text(path, encoding)
        corpus = cls(text, held_out, name=os.fspath(path))
        corpus.path = os.path.abspath(path)
        return corpus

    @classmethod
    def python_topics(cls, held_out: float = 0.05) -> TextCorpus:
        """The English text that Python ships for ``help()``: the language reference, some 400,000 characters.

        Paragraphs that occur more than once are kept once, so that the held-out part is not a copy
        of training text.  The text differs between Python versions; ``sha256`` tells which one it is.
        """
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise ArgumentError(
                "this Python comes without pydoc_data.topics, the text that is used by default; give a text file"
            ) from None
        # A dict keeps the first of equal paragraphs, in order.
        paragraphs = dict.fromkeys(
            paragraph.strip("\n") for key in sorted(topics) for paragraph in topics[key].split("\n\n")
        )
        return cls("\n\n".join(p for p in paragraphs if p.strip()), held_out, name="Python's help topics")

    def encode(self, text: str) -> np.ndarray:
        """The ids of ``text``: int64 ``(len(text),)``.

        Raises
        ------
        OutOfRangeError
            A character that the corpus does not have.
        """
        return encode(text, self.vocabulary)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some ids; the reverse of :meth:`encode`."""
        return decode(ids, self.vocabulary)

    def __repr__(self) -> str:
        return (
            f"TextCorpus({self.name!r}: {len(self.text)} characters, {len(self.vocabulary)} different, "
            f"{len(self.held_out)} held out, sha256 {self.sha256[:12]}...)"
        )


class TextStreams:
    """Chunks of a long id sequence for truncated BPTT (Williams & Peng 1990).

    The sequence is cut into ``batch_size`` contiguous streams that run side by side.  Chunk k holds
    the next ``seq_len`` steps of every stream, so the state after chunk k is the right initial state
    for chunk k + 1.  Each ``for`` loop is one epoch; :meth:`state_dict` works as the
    :class:`~tinygrad_lstm.data.DataLoader`'s.

    Parameters
    ----------
    ids : int array ``(N,)``
    batch_size, seq_len : int
    drop_last : bool
        Leave out a last chunk that is shorter than the others (good for training: all shapes are
        equal); without it every step of the streams comes once (good for evaluation).

    Yields
    ------
    inputs, targets : int64 arrays ``(T, B)``
        Targets are the inputs one step later.

    Raises
    ------
    ShapeError
        Too few ids for a single chunk.

    Examples
    --------
    >>> for inputs, targets in TextStreams(np.arange(9), batch_size=2, seq_len=2):
    ...     print(inputs.T.tolist(), targets.T.tolist())
    [[0, 1], [4, 5]] [[1, 2], [5, 6]]
    [[2, 3], [6, 7]] [[3, 4], [7, 8]]
    """

    def __init__(self, ids: Any, batch_size: int, seq_len: int, drop_last: bool = True) -> None:
        array = read(ids)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ShapeError(f"ids is a 1-d array of ints, found shape {array.shape} and dtype {array.dtype}")
        check_int("TextStreams: batch_size", batch_size)
        check_int("TextStreams: seq_len", seq_len)
        steps = (len(array) - 1) // batch_size
        if steps < (seq_len if drop_last else 1):
            raise ShapeError(
                f"{len(array)} characters are too few for batch_size={batch_size} streams of seq_len={seq_len} steps: "
                f"at least {batch_size * (seq_len if drop_last else 1) + 1} are needed"
            )
        self.batch_size, self.seq_len, self.drop_last = batch_size, seq_len, drop_last
        used = array[: steps * batch_size + 1].astype(np.int64)
        self._inputs = np.ascontiguousarray(used[:-1].reshape(batch_size, steps).T)
        self._targets = np.ascontiguousarray(used[1:].reshape(batch_size, steps).T)
        self._epoch = 0
        self._position = 0
        self._resume = False

    def __len__(self) -> int:
        """Chunks in an epoch."""
        steps = len(self._inputs)
        return steps // self.seq_len if self.drop_last else -(-steps // self.seq_len)

    @property
    def tokens(self) -> int:
        """How many targets an epoch has."""
        steps = len(self._inputs)
        return (len(self) * self.seq_len if self.drop_last else steps) * self.batch_size

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not self._resume:
            self._position = 0
        self._resume = False
        for k in range(self._position, len(self)):
            # The position moves first: a state taken while the caller works on chunk k names k + 1.
            self._position = k + 1
            if self._position == len(self):
                self._epoch, self._position = self._epoch + 1, 0
            part = slice(k * self.seq_len, (k + 1) * self.seq_len)
            yield self._inputs[part], self._targets[part]

    def state_dict(self) -> dict[str, Any]:
        """Where the streams stand: the epoch and the next chunk."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of streams over the same ids."""
        if not isinstance(state, Mapping) or not {"epoch", "position"} <= state.keys():
            raise ArgumentError("TextStreams.load_state_dict: this is no state of streams; pass what state_dict() gave")
        position = int(state["position"])
        if not 0 <= position < len(self):
            raise ArgumentError(f"this state names chunk {position}, an epoch here has {len(self)}: other data")
        self._epoch, self._position, self._resume = int(state["epoch"]), position, True


def encode(text: str, vocabulary: str) -> np.ndarray:
    """The position of each character in ``vocabulary`` (sorted): int64 ``(len(text),)``.

    Raises
    ------
    OutOfRangeError
        A character that the vocabulary does not have.
    """
    if not isinstance(text, str) or not isinstance(vocabulary, str):
        raise DTypeError(f"a text and its vocabulary are str, found {type(text).__name__}, {type(vocabulary).__name__}")
    table, points = _code_points(vocabulary), _code_points(text)
    ids = np.searchsorted(table, points)
    unknown = table[np.minimum(ids, len(table) - 1)] != points
    if unknown.any():
        found = sorted(set(np.array(list(text))[unknown].tolist()))
        shown = ", ".join(repr(c) for c in found[:5]) + (", ..." if len(found) > 5 else "")
        plural = "s" if len(found) > 1 else ""
        raise OutOfRangeError(
            f"unknown character{plural} {shown}: the vocabulary has the {len(vocabulary)} characters {vocabulary!r}"
        )
    return ids.astype(np.int64)


def decode(ids: Iterable[int] | np.ndarray, vocabulary: str) -> str:
    """The characters at the given positions of ``vocabulary``; the reverse of :func:`encode`."""
    array = read(ids if isinstance(ids, np.ndarray) else list(ids))
    if array.size == 0:
        return ""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ShapeError(f"ids is a 1-d array of ints, found shape {array.shape} and dtype {array.dtype}")
    if array.min() < 0 or array.max() >= len(vocabulary):
        bad = array[(array < 0) | (array >= len(vocabulary))][0]
        raise OutOfRangeError(f"id {bad} in a vocabulary of {len(vocabulary)} characters")
    return "".join(vocabulary[i] for i in array.tolist())


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
