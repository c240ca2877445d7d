"""Checkpoints: what goes in comes out, in the safetensors format, or the old file stays."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinygrad_lstm as tg
from tinygrad_lstm import serialization
from tinygrad_lstm.errors import ArgumentError, CheckpointError, DTypeError, FileError
from tinygrad_lstm.serialization import load, read_metadata, save

DTYPES = [np.dtype(code).name for code in "?bhiqBHIQefd"]  # bool, int8 .. 64, uint8 .. 64, float16 .. 64


def alike(a: Any, b: Any) -> bool:
    """Equal in structure, types, dtypes, shapes and bits (any NaN equals any other as a Python float)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def stray(folder: Path, *expected: str) -> set[str]:
    return set(os.listdir(folder)) - set(expected)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.safetensors"


# -- round trip ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(math.prod(shape)) % 2).reshape(shape).astype(dtype)
    save(path, {"a": array})
    back = load(path)["a"]
    assert alike(back, array)
    assert back.flags.writeable and back.flags.c_contiguous and back.flags.owndata is not None


@pytest.mark.parametrize(
    "tree",
    [
        None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, -(2**200), 10**6000, 0.1, -0.0, 5e-324,
        float("nan"), float("inf"), -float("inf"), "", "tiefe Nächte ☂ \ud800 \x00", [], {}, (), [[]], [()],
        {"a": None}, {"": 1}, {"/": 1, "a/b": 2}, {"$array": "a"}, {"$x": 1, "y": 2}, {"__metadata__": np.zeros(2)},
        {0: "zero", 1: [1, (2, {3: 4})]}, {"1": "text", 1: "int"}, np.float32(1.5), np.float64("nan"), np.bool_(True),
        np.int8(-3), np.zeros(()), [np.zeros(1), (np.ones(1),)], {"a/b": np.zeros(1), "a": {"b": np.ones(1)}},
        {"state": {0: {"step": 3, "exp_avg": np.ones((2, 2), np.float32)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
    ],
    ids=lambda tree: type(tree).__name__,
)  # fmt: skip
def test_trees_come_back_alike(path: Path, tree: Any) -> None:
    save(path, tree)
    assert alike(load(path), tree)


numbers = st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=5)
arrays = hnp.arrays(st.sampled_from(DTYPES).map(np.dtype), hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
trees = st.recursive(
    numbers | arrays,
    lambda t: (
        st.lists(t, max_size=3)
        | st.lists(t, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(-3, 3), t, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_random_trees_come_back_alike(tmp_path: Path, tree: Any) -> None:
    save(tmp_path / "x", tree)
    assert alike(load(tmp_path / "x"), tree)
    assert stray(tmp_path, "x") == set()


def test_layouts_are_saved_by_value(path: Path) -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    tree = {"T": base.T, "strided": base[::2, ::-1], "broadcast": np.broadcast_to(np.float32(7), (2, 2))}
    tree["big_endian"] = base.astype(">f4")
    tree["read_only"] = np.frombuffer(base.tobytes(), np.float32)
    save(path, tree)
    for name, back in load(path).items():
        assert np.array_equal(back, tree[name]), name
        assert back.dtype == np.float32 and back.dtype.isnative and back.flags.writeable


def test_tensors_and_generator_states(path: Path) -> None:
    t = tg.tensor(np.arange(3.0), requires_grad=True)
    generator = tg.Generator(5)
    save(path, {"t": t, "rng": generator.get_state()})
    expected = generator.uniform(size=4)
    back = load(path)
    assert alike(back["t"], np.arange(3.0))
    other = tg.Generator(0)
    other.set_state(back["rng"])
    assert np.array_equal(other.uniform(size=4), expected)


def test_loaded_arrays_do_not_share_memory(path: Path) -> None:
    a = np.zeros(3)
    save(path, [a, a])
    x, y = load(path)
    x[0] = 1
    assert y[0] == 0 and load(path)[0][0] == 0


def test_metadata(path: Path) -> None:
    assert tg.save is save and tg.load is load
    note = {"kind": "demo", "n": 2**70, "x": float("inf"), "list": [1, None, ("a", 2)]}
    save(path, {"a": np.ones(2)}, metadata=note)
    assert alike(read_metadata(path), note)
    save(path, {})
    assert read_metadata(path) == {}
    with pytest.raises(DTypeError, match=r"\['metadata'\]\['a'\] is an array"):
        save(path, {}, metadata={"a": np.ones(2)})
    with pytest.raises(DTypeError, match="metadata is a dict"):
        save(path, {}, metadata=3)  # type: ignore[arg-type]


def test_equal_trees_make_equal_files(tmp_path: Path) -> None:
    tree = {"a": np.arange(3), "b": [1.5, "x"]}
    for name in "12":
        save(tmp_path / name, tree)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_the_safetensors_package_reads_our_files(path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    tree = {dtype: np.arange(6).reshape(2, 3).astype(dtype) for dtype in DTYPES}
    save(path, {"model": tree, "empty": np.zeros((0, 2), np.float32), "zero": np.float64(3)})
    found = reference.load_file(path)
    assert set(found) == {f"model/{d}" for d in DTYPES} | {"empty", "zero"}
    for dtype in DTYPES:
        assert alike(found[f"model/{dtype}"], tree[dtype])
    assert found["empty"].shape == (0, 2) and found["zero"].shape == ()


# -- what cannot be saved ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [1, object()]}, r"the tree\['a'\]\[1\] is of type object"),
        ({"a": 1j}, r"the tree\['a'\] is of type complex"),
        ({"a": np.zeros(2, complex)}, r"the tree\['a'\] has dtype complex128"),
        ([np.array(["x"])], r"the tree\[0\] has dtype <U1"),
        ([np.array([None])], r"the tree\[0\] has dtype object"),
        ([np.ma.masked_array([1.0, 2.0], [0, 1])], "masked"),
        ({"a": {1.5: 2}}, r"the tree\['a'\] has the key 1.5"),
        ({True: 2}, "the tree has the key True"),
        ({"s": {1, 2}}, "type set"),
        ({"b": b"x"}, "type bytes"),
    ],
)
def test_unsupported_leaves_are_named(path: Path, tree: Any, message: str) -> None:
    with pytest.raises(DTypeError, match=message):
        save(path, tree)
    assert stray(path.parent) == set()


def test_a_tree_that_contains_itself(path: Path) -> None:
    tree: dict[str, Any] = {}
    tree["a"] = [tree]
    with pytest.raises(ArgumentError, match=r"\['a'\]\[0\] contains itself"):
        save(path, tree)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ArgumentError, match="too deep"):
        save(path, deep)
    save(path, [shared := [1, 2], shared])  # sharing is not a cycle
    assert load(path) == [[1, 2], [1, 2]]


# -- atomic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
@pytest.mark.parametrize("old", [True, False])
def test_a_failed_save_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, when: str, old: bool
) -> None:
    if old:
        save(path, "old")

    def fail(*args: Any) -> Any:
        raise error

    target = {"write": (safetensors.numpy, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[when]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(FileError if isinstance(error, OSError) else KeyboardInterrupt) as info:
            save(path, {"a": np.ones(3)})
    if isinstance(error, OSError):
        assert isinstance(info.value, OSError) and str(info.value) == f"cannot write {path}: no space left on device"
    assert stray(path.parent, path.name) == set()
    assert path.exists() == old and (not old or load(path) == "old")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for bad in [tmp_path / "no" / "x", tmp_path, tmp_path / "file" / "x", tmp_path / ("n" * 300), "a\0b"]:
        with pytest.raises(FileError, match=r"^cannot write ") as info:
            save(bad, 1)
        assert "\n" not in str(info.value)
    assert stray(tmp_path, "file") == set()
    with pytest.raises(DTypeError, match="path"):
        save(3, 1)  # type: ignore[arg-type]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_follow_the_umask_and_the_old_file(path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(path, 1)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        save(path, 2)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="symbolic links and pipes")
def test_links_are_followed_and_pipes_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(Path("real") / "file")
    save(link, 1)  # dangling at first: made at its target, as open() does
    save(link, 2)
    assert link.is_symlink() and load(tmp_path / "real" / "file") == 2 and load(link) == 2
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="no regular file"):
        save(tmp_path / "pipe", 1)
    with pytest.raises(CheckpointError, match="no regular file"):
        load(tmp_path / "pipe")


# -- damaged and foreign files --------------------------------------------------------------------------


def one_line(path: Path) -> str:
    for read in (load, read_metadata):
        with pytest.raises(CheckpointError) as info:
            read(path)
    assert isinstance(info.value, ValueError)
    message = str(info.value)
    assert str(path) in message and "\n" not in message and len(message) < 400
    return message


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="folder"):
        load(tmp_path)


def test_foreign_files(path: Path) -> None:
    rng = np.random.default_rng(0)
    path.write_bytes(b"")
    assert "empty" in one_line(path)
    for content in [b"\0", b"\0" * 8, b"\0" * 100, b"\xff" * 100, b"a text\n" * 50, rng.bytes(5000)]:
        path.write_bytes(content)
        one_line(path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a", "b")
    one_line(path)
    path.write_bytes(pickle.dumps({"a": np.ones(3)}))
    one_line(path)
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    one_line(path)
    for header in [b"[" * 200_000, b"[]", b"3", b"null", b"{}", b'{"__metadata__": 3}', b'{"__metadata__": {"a": 1}}']:
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        one_line(path)


def test_safetensors_of_another_program(path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4)
    assert "not one that tg.save wrote" in one_line(path)


def test_every_cut_and_every_changed_byte_is_noticed(path: Path) -> None:
    """No prefix and no single changed byte loads as something else (padding may change harmlessly)."""
    tree = {"w": np.arange(4, dtype=np.float32), "flags": np.array([True, False]), "step": 7, "x": [1.5, None, (2,)]}
    save(path, tree)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError):
            load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        load(path)
    for n in range(len(whole)):
        for flip in (0x01, 0x20, 0x80):
            path.write_bytes(whole[:n] + bytes([whole[n] ^ flip]) + whole[n + 1 :])
            try:
                back = load(path)
            except CheckpointError:
                continue
            assert alike(back, tree), (n, flip)


GOOD_ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def forge(path: Path, entries: Any, record: Any, data: bytes = b"") -> None:
    """A file with right checksums around whatever is given."""
    raw = json.dumps(record)
    well_described = {name: np.zeros(1, np.float32) for name, entry in entries.items() if entry == GOOD_ENTRY}
    note = {"tinygrad_lstm": f"{serialization._header_checksum(well_described, raw):08x}{raw}"}
    header = json.dumps({"__metadata__": note, **entries}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    "entries",
    [
        {"a": 3}, {"a": {}}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [None, 4]}},
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_descriptions_of_arrays(path: Path, entries: Any) -> None:
    record = {"version": 1, "tree": {"$array": "a"}, "metadata": {}, "data_crc32": 0}
    forge(path, entries, record, b"\0" * 4)
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


@pytest.mark.parametrize(
    "tree",
    [
        {"$array": "a"}, {"$array": ["a"]}, {"$scalar": None}, {"$int": 3}, {"$int": "zz"}, {"$float": "x"},
        {"$float": [1]}, {"$tuple": 3}, {"$dict": 3}, {"$dict": [[1]]}, {"$dict": [[[], 1]]}, {"$unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_trees(path: Path, tree: Any) -> None:
    forge(path, {}, {"version": 1, "tree": tree, "metadata": tree, "data_crc32": 0})
    assert "damaged" in one_line(path)


@pytest.mark.parametrize("record", [3, None, [], "x", {}, {"version": "x"}, {"version": 1}, {"version": None}], ids=str)
def test_wrong_records(path: Path, record: Any) -> None:
    forge(path, {}, record)
    assert "damaged" in one_line(path)


def test_a_newer_version_is_named(path: Path) -> None:
    forge(path, {}, {"version": 99, "tree": 1, "metadata": {}, "data_crc32": 0})
    assert "version 99" in one_line(path)
