"""Tape.to_table: rows, selections, text, and selections of what there is not."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import inspect, nn, ops

SHOWN = ("serial", "op", "name", "module", "t", "value", "norm", "source")

X = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 5, num_layers=2)
        self.readout = nn.Linear(5, 1)

    def forward(self, x: object) -> tg.Tensor:
        return self.readout(self.encoder(x)[0][-1])


@pytest.fixture(scope="module")
def tape() -> tg.Tape:
    with tg.Tape() as tape, tg.eager():
        Model()(X)
    return tape


def test_one_row_for_each_value(tape: tg.Tape) -> None:
    table = tape.to_table()
    expected = [
        (record.serial, record.primitive.name, k, out.shape, out.dtype)
        for record in tape.records
        for k, out in enumerate(tape.outputs(record))
    ]
    found = [(r["serial"], r["op"], r["output"], r["shape"], r["dtype"]) for r in table.rows]
    assert found == expected and len(table) == len(expected) > len(tape)
    for row, (record, k) in zip(
        table, [(r, k) for r in tape.records for k in range(len(tape.outputs(r)))], strict=True
    ):
        value = tape.outputs(record)[k].numpy()
        assert row["value"] is not value and np.array_equal(row["value"], value)
        assert row["norm"] == pytest.approx(np.sqrt((value.astype(float) ** 2).sum()), rel=1e-12)
        assert re.fullmatch(r".+\.py:\d+", row["source"])


def test_selections(tape: tg.Tape) -> None:
    table = tape.to_table(t=2, module="encoder.l1", gate="f")
    (row,) = table.rows
    assert (row["name"], row["t"], row["module"], row["op"]) == ("f", 2, "encoder.l1", "sigmoid")
    assert set(tape.to_table(t=range(1, 3))["t"]) == {1, 2}
    assert set(tape.to_table(module="encoder")["module"]) == {"encoder", "encoder.l0", "encoder.l1"}
    assert set(tape.to_table(module="readout")["op"]) == {"transpose", "matmul", "add"}
    assert {row["name"] for row in tape.to_table(gate=("i", "c"))} == {"i", "c"}
    assert len(tape.to_table(gate=["i", "c"])) == 2 * 2 * 4
    assert len(tape.to_table(module="readout", t=1)) == 0  # both are there, together they are not
    outside = tape.to_table(module="")
    assert set(outside["module"]) == {""} and len(outside) == 1


def test_names_of_one_output_of_several() -> None:
    with tg.Tape() as tape:
        a, b = ops.split(tg.asarray(np.arange(4.0)), 2)
        tg.name(b, "second")
    rows = [(r["output"], r["name"], r["value"].tolist()) for r in tape.to_table()]
    assert rows == [(0, None, [0.0, 1.0]), (1, "second", [2.0, 3.0])]
    assert tape.to_table(gate="second")["output"] == [1]
    assert a.shape == b.shape


def test_columns_and_text(tape: tg.Tape) -> None:
    table = tape.to_table(gate=["h", "c"])
    columns = table.columns()
    assert columns["name"] == table["name"] == ["c", "h"] * 8 and set(map(len, columns.values())) == {16}
    lines = str(table).splitlines()
    assert len(lines) == 17 and lines[0].split() == list(SHOWN)
    assert "float32[2,5]" in lines[1] and "cells.py:" in lines[1]
    whole = str(tape.to_table())
    assert "rows left out" in whole and len(whole.splitlines()) == 62
    with pytest.raises(tg.ArgumentError, match="no column 'nrom'; it has serial"):
        table["nrom"]


def test_html_is_well_formed(tape: tg.Tape) -> None:
    table = tape.to_table(t=0)
    opened: list[str] = []
    counts: dict[str, int] = {}

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            opened.append(tag)
            counts[tag] = counts.get(tag, 0) + 1

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Check().feed(table._repr_html_())
    assert not opened and counts["tr"] == len(table) + 1 and counts["td"] == 8 * len(table)
    counts.clear()
    Check().feed(tape.to_table()._repr_html_())
    assert not opened and counts["tr"] == 62 and counts["td"] == 8 * 60 + 1


def test_values_cannot_be_written_to(tape: tg.Tape) -> None:
    with pytest.raises(ValueError, match="read-only"):
        tape.to_table(gate="h").rows[0]["value"][0] = 1.0


@pytest.mark.parametrize(
    ("selection", "kind", "message"),
    [
        ({"t": 9}, tg.ArgumentError, r"no records of t = \[9\]; the steps are 0 to 3"),
        ({"t": [0, -1]}, tg.ArgumentError, r"t = \[-1\]"),
        ({"t": 1.0}, tg.DTypeError, "found 1.0"),
        ({"t": "1"}, tg.DTypeError, "found '1'"),
        ({"t": True}, tg.DTypeError, "found True"),
        ({"t": [0.5]}, tg.DTypeError, "ints"),
        ({"gate": "z"}, tg.ArgumentError, r"no value named \['z'\]; named are \['c', 'f', 'g', 'h', 'i', 'o'\]"),
        ({"gate": 3}, tg.DTypeError, "found 3"),
        ({"gate": ["i", 3]}, tg.DTypeError, "found"),
        ({"module": "enc"}, tg.ArgumentError, r"module 'enc'; the paths are \['', 'encoder', 'encoder.l0'"),
        ({"module": 1}, tg.DTypeError, "found 1"),
    ],
)
def test_what_there_is_not(tape: tg.Tape, selection: dict[str, object], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        tape.to_table(**selection)


def test_a_compiled_loop_has_no_steps() -> None:
    with tg.Tape() as tape:
        nn.LSTM(3, 5)(X)
    assert "scan" in tape.to_table()["op"]
    with pytest.raises(tg.ArgumentError, match=r"run the model inside of tg\.eager\(\)"):
        tape.to_table(t=0)
    with pytest.raises(tg.ArgumentError, match=r"no value named \['f'\].*run the model inside of tg\.eager\(\)"):
        tape.to_table(gate="f")
    with pytest.raises(tg.ArgumentError, match=r"module 'l0'; .*run the model inside of tg\.eager\(\)"):
        tape.to_table(module="l0")
    with tg.Tape() as tape, tg.eager():
        nn.LSTM(3, 5)(X)
    with pytest.raises(tg.ArgumentError) as caught:
        tape.to_table(gate="z")
    assert "eager" not in str(caught.value)


def test_an_empty_tape_and_numbers_of_every_kind() -> None:
    with tg.Tape() as tape:
        pass
    table = tape.to_table()
    assert len(table) == 0 and len(str(table).splitlines()) == 1 and isinstance(table, inspect.Table)
    with tg.Tape() as tape:
        x = tg.asarray(np.array([np.inf, 1.0]))
        ops.greater(x, 0.0)
        ops.sum(x)
        ops.argmax(x)
        x[:0] * 2.0
    table = tape.to_table()
    norms = dict(zip(table["op"], table["norm"], strict=True))
    expected = {"greater": np.sqrt(2), "sum": np.inf, "argmax": 0.0, "getitem": 0.0, "multiply": 0.0}
    assert {op: norms[op] for op in expected} == expected
