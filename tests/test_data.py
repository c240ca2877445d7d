"""Data: batches hold the right steps, split and resume lose nothing, wrong input is named."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm.data import DataLoader, SequenceDataset, TextCorpus, TextStreams, windows
from tinygrad_lstm.data.text import decode, encode
from tinygrad_lstm.errors import ArgumentError, DTypeError, OutOfRangeError, ShapeError


def ragged(lengths: list[int], features: int = 2) -> SequenceDataset:
    """Sequence n is filled with n + 1; its target is n, or [n, n, ...] per step."""
    return SequenceDataset([np.full((t, features), n + 1.0) for n, t in enumerate(lengths)], list(range(len(lengths))))


# -- sequences -----------------------------------------------------------------------------------------


def test_padding_lengths_and_time_major() -> None:
    batches = list(DataLoader(ragged([3, 1, 0, 2]), batch_size=3, pad_value=-1))
    assert [b.inputs.shape for b in batches] == [(3, 3, 2), (2, 1, 2)]
    assert [b.lengths.tolist() for b in batches] == [[3, 1, 0], [2]]
    assert batches[0].targets is not None and batches[0].targets.tolist() == [0, 1, 2]
    assert batches[0].inputs[:, :, 0].T.tolist() == [[1, 1, 1], [2, -1, -1], [-1, -1, -1]]
    first = next(iter(DataLoader(ragged([3, 1]), batch_size=2, batch_first=True)))
    assert first.inputs.shape == (2, 3, 2) and first.inputs[1, :, 0].tolist() == [2, 0, 0]


@pytest.mark.parametrize(("dtype", "pad"), [(np.int64, -100), (np.uint8, 0), (np.float32, 0)])
def test_targets_per_step_are_padded(dtype: Any, pad: float) -> None:
    inputs = [np.ones((t, 1), np.float32) for t in (1, 3)]
    targets = [np.arange(1, t + 1, dtype=dtype) for t in (1, 3)]
    batch = next(iter(DataLoader(SequenceDataset(inputs, targets), batch_size=2)))
    assert batch.targets is not None and batch.targets.dtype == dtype
    assert batch.targets.T.tolist() == [[1, pad, pad], [1, 2, 3]]


def test_per_step_can_be_told() -> None:
    x, y = np.zeros((4, 3, 1)), np.zeros((4, 3))
    assert SequenceDataset(x, y).per_step
    batch = next(iter(DataLoader(SequenceDataset(x, y, per_step=False), batch_size=2)))
    assert batch.targets is not None and batch.targets.shape == (2, 3)
    with pytest.raises(ShapeError, match=r"targets\[0\] has shape \(2,\).*3 steps"):
        SequenceDataset(x, np.zeros((4, 2)), per_step=True)


def test_dataset_without_targets_and_indexing() -> None:
    ds = SequenceDataset(np.arange(6.0).reshape(3, 2))
    x, y = ds[-1]
    assert x.tolist() == [4, 5] and y is None
    with pytest.raises(OutOfRangeError, match="3"):
        ds[3]
    assert [x.tolist() for x, _ in ds] == [[0, 1], [2, 3], [4, 5]]  # iteration ends by IndexError


def test_datasets_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="at least one sequence"):
        SequenceDataset([])
    with pytest.raises(ShapeError, match=r"inputs\[1\] has shape \(3, 4\)"):
        SequenceDataset([np.zeros((2, 3)), np.zeros((3, 4))])
    with pytest.raises(ShapeError, match="2 sequences need as many targets, found 1"):
        SequenceDataset(np.zeros((2, 3)), [1])
    with pytest.raises(ShapeError, match="single number"):
        SequenceDataset([1.0, 2.0])
    with pytest.raises(DTypeError, match=r"inputs\[0\] has dtype object"):
        SequenceDataset([np.array([None])])
    with pytest.raises(ArgumentError, match="batch_size"):
        DataLoader(ragged([1]), batch_size=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 7), st.booleans())
def test_an_epoch_has_every_sequence_once(n: int, batch_size: int, drop_last: bool) -> None:
    loader = DataLoader(ragged([1] * n), batch_size, shuffle=True, drop_last=drop_last, generator=tg.Generator(1))
    seen = [int(t) for batch in loader if batch.targets is not None for t in batch.targets]
    kept = n - n % batch_size if drop_last else n
    assert len(seen) == kept and len(set(seen)) == kept and set(seen) <= set(range(n))
    assert len(list(loader)) == len(loader)


def orders(loader: DataLoader) -> list[list[int]]:
    return [batch.targets.tolist() for batch in loader if batch.targets is not None]


def test_shuffling_is_seeded_and_differs_between_epochs() -> None:
    def make(seed: int) -> DataLoader:
        return DataLoader(ragged([1] * 30), 4, shuffle=True, generator=tg.Generator(seed))

    a, b = make(3), make(3)
    first, second = orders(a), orders(a)
    assert [first, second] == [orders(b), orders(b)]
    assert first != second and first != orders(make(4))
    tg.seed(9)
    default = orders(DataLoader(ragged([1] * 30), 4, shuffle=True))
    tg.seed(9)
    assert default == orders(DataLoader(ragged([1] * 30), 4, shuffle=True))
    assert orders(DataLoader(ragged([1] * 5), 2)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("taken", range(5))
def test_loader_resumes_with_the_next_batch(taken: int, tmp_path: Path) -> None:
    def make() -> DataLoader:
        return DataLoader(ragged([1] * 10), 3, shuffle=True, generator=tg.Generator(3))

    straight, stopped, resumed = make(), make(), make()
    expected = orders(straight) + orders(straight)
    orders(resumed)  # in another place, with another order, until the state is loaded
    iterator = iter(stopped)
    seen = [next(iterator).targets.tolist() for _ in range(min(taken, 4))]  # type: ignore[union-attr]
    tg.save(tmp_path / "s", stopped.state_dict())
    resumed.load_state_dict(tg.load(tmp_path / "s"))
    seen += orders(resumed)
    if len(seen) < 8:
        seen += orders(resumed)
    assert seen == expected[: len(seen)] and len(seen) == 8


def test_loader_state_of_other_data() -> None:
    loader = DataLoader(ragged([1] * 10), 3)
    next(iter(loader))
    with pytest.raises(ArgumentError, match="other data"):
        DataLoader(ragged([1] * 9), 3).load_state_dict(loader.state_dict())


def test_windows_hold_every_window_once() -> None:
    series = np.arange(20.0).reshape(10, 2)
    x, y = windows(series, length=4, horizon=3)
    assert x.shape == (4, 4, 2) and y.shape == (4, 3, 2)
    for n in range(4):
        assert np.array_equal(x[n], series[n : n + 4]) and np.array_equal(y[n], series[n + 4 : n + 7])
    x[:] = -1  # a copy
    assert series.min() == 0
    x, y = windows([1, 2, 3], 2)
    assert x.tolist() == [[1, 2]] and y.tolist() == [[3]]
    with pytest.raises(ShapeError, match="too short"):
        windows([1, 2], 2)
    with pytest.raises(ArgumentError, match="horizon"):
        windows([1, 2], 1, 0)


# -- text ----------------------------------------------------------------------------------------------


def test_corpus_split_vocabulary_and_hash() -> None:
    text = "the quick brown fox " * 10
    corpus = TextCorpus(text, held_out=0.25)
    assert corpus.decode(corpus.train) + corpus.decode(corpus.held_out) == text
    assert len(corpus.held_out) == 50
    assert corpus.vocabulary == "".join(sorted(set(text)))
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert corpus.train.dtype == np.int64


@given(st.text(min_size=1, max_size=30))
def test_encode_and_decode_are_inverse(text: str) -> None:
    vocabulary = "".join(sorted(set(text)))
    ids = encode(text, vocabulary)
    assert ids.shape == (len(text),) and decode(ids, vocabulary) == text
    assert decode(ids.tolist(), vocabulary) == text


def test_unknown_characters_and_ids() -> None:
    corpus = TextCorpus("abcabc" * 5)
    with pytest.raises(OutOfRangeError, match="unknown characters 'X', '☂': the vocabulary has the 3 characters 'abc'"):
        corpus.encode("aX☂X")
    with pytest.raises(OutOfRangeError, match="unknown character 'A'"):
        corpus.encode("A")
    assert corpus.encode("").shape == (0,) and corpus.decode([]) == ""
    for bad in ([3], [-1]):
        with pytest.raises(OutOfRangeError, match=f"id {bad[0]} in a vocabulary of 3"):
            corpus.decode(bad)
    with pytest.raises(ShapeError, match="ints"):
        corpus.decode([0.5])  # type: ignore[list-item]


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "Grüße\r\nund\rmehr\n".encode())
    assert TextCorpus.from_file(path, held_out=0.2).text == "Grüße\nund\nmehr\n"
    path.write_bytes("Grüße aus Köln".encode("latin-1"))
    with pytest.raises(ArgumentError, match=r"text.txt is not text in utf-8: byte 0xfc at offset 2$"):
        TextCorpus.from_file(path)
    assert TextCorpus.from_file(path, held_out=0.2, encoding="latin-1").text == "Grüße aus Köln"
    path.write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"text.txt is empty"):
        TextCorpus.from_file(path)
    path.write_bytes(b"abc")
    with pytest.raises(ArgumentError, match="too short"):
        TextCorpus.from_file(path)
    with pytest.raises(FileNotFoundError):
        TextCorpus.from_file(tmp_path / "none")
    with pytest.raises(ArgumentError, match="no encoding called 'klingon'"):
        path.write_bytes(b"abc")
        TextCorpus.from_file(path, encoding="klingon")
    for bad in (0.0, 1.0, float("nan")):
        with pytest.raises(ArgumentError, match="held_out"):
            TextCorpus("text", held_out=bad)


def test_default_corpus_has_no_paragraph_twice() -> None:
    corpus = TextCorpus.python_topics()
    paragraphs = corpus.text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert 200_000 < len(corpus.text) < 1_000_000
    assert abs(len(corpus.held_out) / len(corpus.text) - 0.05) < 1e-4
    assert corpus.sha256 == TextCorpus.python_topics().sha256
    assert "assignment" in corpus.text.lower()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(1, 5), st.integers(1, 8), st.booleans())
def test_streams_are_contiguous_and_targets_follow(n: int, batch: int, length: int, drop: bool) -> None:
    ids = np.arange(n)
    if (n - 1) // batch < (length if drop else 1):
        with pytest.raises(ShapeError, match="too few"):
            TextStreams(ids, batch, length, drop)
        return
    streams = TextStreams(ids, batch, length, drop)
    chunks = list(streams)
    assert len(chunks) == len(streams)
    inputs = np.concatenate([x for x, _ in chunks])
    targets = np.concatenate([y for _, y in chunks])
    assert np.array_equal(targets, inputs + 1)
    assert (np.diff(inputs, axis=0) == 1).all()  # chunk after chunk, each stream goes on where it was
    assert targets.size == streams.tokens
    if drop:
        assert all(x.shape == (length, batch) for x, _ in chunks)
    else:
        assert np.array_equal(np.sort(inputs.ravel()), np.arange((n - 1) // batch * batch))


@pytest.mark.parametrize("taken", range(5))
def test_streams_resume_with_the_next_chunk(taken: int) -> None:
    def make() -> TextStreams:
        return TextStreams(np.arange(41), 2, 5)

    stopped, resumed = make(), make()
    expected = [x.tolist() for x, _ in make()] * 2
    iterator = iter(stopped)
    seen = [next(iterator)[0].tolist() for _ in range(taken)]
    next(iter(resumed))
    resumed.load_state_dict(stopped.state_dict())
    while len(seen) < 8:
        seen += [x.tolist() for x, _ in resumed]
    assert seen == expected
    with pytest.raises(ArgumentError, match="other data"):
        make().load_state_dict({"epoch": 0, "position": 4})


def test_streams_of_wrong_ids() -> None:
    for bad in (np.zeros(9), np.zeros((3, 3), int)):
        with pytest.raises(ShapeError, match="1-d array of ints"):
            TextStreams(bad, 1, 1)
    with pytest.raises(ArgumentError, match="seq_len"):
        TextStreams(np.arange(9), 1, 0)


IDS = SequenceDataset([[1, 2], [3]], [np.array([0, 1], np.uint8), np.array([1], np.uint8)])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DataLoader(None), DTypeError, "dataset is a NoneType, expected a SequenceDataset"),
        (lambda: DataLoader([np.ones((3, 2))]), DTypeError, r"dataset is a list.*DataLoader\(SequenceDataset\("),
        (lambda: DataLoader(ragged([2, 3]), batch_size=2.5), DTypeError, r"batch_size is an int, found 2\.5"),
        (lambda: DataLoader(ragged([2, 3]), batch_size=0), ArgumentError, "batch_size is at least 1, found 0"),
        (lambda: DataLoader(ragged([2, 3]), generator=3), DTypeError, r"generator is a tg\.Generator, found int"),
        (lambda: DataLoader(ragged([2, 3]), pad_value="x"), DTypeError, "pad_value is a number, found 'x'"),
        (lambda: DataLoader(IDS, pad_value=1.5), ArgumentError, r"pad_value=1\.5 is no int64"),
        (lambda: DataLoader(IDS, pad_value=np.nan), ArgumentError, "pad_value=nan is no int64"),
        (lambda: DataLoader(IDS, target_pad_value=-1), ArgumentError, "target_pad_value=-1 is no uint8"),
        (lambda: IDS["a"], DTypeError, "an index is an int, found 'a'"),
        (lambda: IDS[:1], DTypeError, r"an index is an int, found slice"),
        (lambda: DataLoader(IDS).load_state_dict({}), ArgumentError, "no state of a DataLoader"),
        (lambda: TextStreams(np.arange(9), 1, 2).load_state_dict({}), ArgumentError, "no state of streams"),
        (lambda: TextStreams(np.arange(9), 1.5, 2), DTypeError, r"batch_size is an int, found 1\.5"),
        (lambda: TextStreams(np.arange(9), 1, "2"), DTypeError, "seq_len is an int, found '2'"),
        (lambda: windows(np.arange(9), 3.5), DTypeError, r"windows: length is an int, found 3\.5"),
        (lambda: windows(np.arange(9), 3, "1"), DTypeError, "windows: horizon is an int, found '1'"),
        (lambda: SequenceDataset(None), DTypeError, "inputs are a list of arrays, or one array, found None"),
        (lambda: SequenceDataset(np.array(3.0)), DTypeError, "inputs are a list of arrays"),
        (lambda: SequenceDataset("abc"), DTypeError, "inputs are a list of arrays"),
        (lambda: SequenceDataset([np.ones((3, 2))], 3), DTypeError, "targets are a list of arrays"),
        # Two targets for each sequence are natural, and no array.
        (lambda: SequenceDataset([np.ones((3, 2))], [(np.ones((3, 2)), np.ones(3))]), ShapeError,
         r"targets\[0\] is a tuple whose items differ in shape, expected one array"),
        (lambda: SequenceDataset([[1], [[1], [2, 3]]]), ShapeError, r"inputs\[1\] is a list whose items differ"),
        (lambda: windows([[1, 2], [3]], 1), ShapeError, "windows: series is a list whose items differ in shape"),
        (lambda: TextStreams([[1, 2], [3]], 1, 1), ShapeError, "nested lists of unequal lengths"),
    ],
)  # fmt: skip
def test_arguments_of_another_kind(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
