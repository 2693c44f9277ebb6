from __future__ import annotations

import pytest

from moesaic.report.tables import MISSING, Column, Table

COLUMNS = [
    Column("split", "Split"),
    Column("loss", "Loss", "fixed", 2, best="min", note="nats a token"),
    Column("check", "Check", "scientific", 1),
    Column("size", "Size", "integer", best="max"),
]
ROWS = [
    {"split": "random", "loss": 3.456, "check": 1.23e-6, "size": 12345},
    {"split": "a|b", "loss": 3.1, "check": None, "size": 2},
    {"split": "none"},
]


def test_best_is_the_smallest_or_largest_and_ties_are_shared():
    cells = Table(COLUMNS, ROWS).cells()
    assert [[cell.best for cell in row] for row in cells] == [
        [False, False, False, True],
        [False, True, False, False],
        [False, False, False, False],
    ]
    tie = Table(COLUMNS[1:2], [{"loss": 1.0}, {"loss": 1.0}, {"loss": 2.0}]).cells()
    assert [row[0].best for row in tie] == [True, True, False]
    assert not Table(COLUMNS[1:2], [{"loss": 1.0}, {}]).cells()[0][0].best, "nothing to compare"


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        (Column("x", "x", "integer"), 1234567, "1,234,567"),
        (Column("x", "x", "fixed", 2), 2.345678, "2.35"),
        (Column("x", "x", "signed", 1), 2.0, "+2.0"),
        (Column("x", "x", "scientific", 1), 0.0, "0"),
        (Column("x", "x", "scientific", 1), 0.00012, "1.2e-04"),
        (Column("x", "x", "percent", 1), 0.125, "12.5 %"),
        (Column("x", "x", "fixed"), None, MISSING),
        (Column("x", "x"), True, "yes"),
    ],
)
def test_values_are_written(column: Column, value: object, text: str):
    assert column.write(value) == text


def test_text_is_aligned():
    lines = Table(COLUMNS, ROWS).text().splitlines()
    assert lines[0].split() == ["Split", "Loss", "Check", "Size"]
    assert len(lines) == 2 + len(ROWS)
    ends = [len(line) for line in lines]
    assert ends[0] == ends[1], "titles and rule are equally wide"
    assert "3.10*" in lines[3]
    assert "3.46*" not in lines[2]


def test_markdown_escapes_bars_and_marks_the_best():
    lines = Table(COLUMNS, ROWS).markdown().splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[3].startswith(r"| a\|b | **3.10** |")
    assert lines[4] == f"| none | {MISSING} | {MISSING} | {MISSING} |"
