from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import Row, compare, document, quartiles, save, show, timed, versions
from edge import __version__


def result(*rows: Row, quick: bool = False) -> dict[str, Any]:
    return document("which is quicker?", rows, quick=quick, packages={"peer": "1.2"}, notes={"reference": "ours"})


def test_a_round_is_compared_with_the_same_round() -> None:
    # Both slow down together: the times spread, the ratios do not.
    row = timed("12 tokens", "peer", "p50", "ms", [2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (row.value, row.low, row.high, row.n) == (6.0, 4.0, 8.0, 5)
    assert (row.ratio, row.ratio_low, row.ratio_high) == (2.0, 2.0, 2.0)
    assert row.better == "lower"
    assert timed("64 texts", "peer", "rate", "texts/s", [1.0], [2.0]).better == "higher"
    with pytest.raises(ValueError, match="shorter"):
        timed("12 tokens", "peer", "p50", "ms", [1.0, 2.0], [1.0])


def test_quartiles_include_the_ends() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0)


def test_a_file_can_be_read_again(tmp_path: Path) -> None:
    rows = [
        timed("12 tokens", "ours", "p50", "ms", [1.2345678, 1.3], [1.2345678, 1.3]),
        Row("12 tokens", "größe", "rss", "MB", 43.0),
    ]
    written = result(*rows)
    path = tmp_path / "new folder" / "speed.json"
    save(path, written)
    text = path.read_text("utf-8")
    assert json.loads(text) == written
    assert sum(line.startswith('  {"case"') for line in text.splitlines()) == len(rows)  # one a line
    assert list(path.parent.iterdir()) == [path]
    assert written["rows"][1] == {
        **{"case": "12 tokens", "subject": "größe", "measure": "rss", "unit": "MB", "value": 43.0, "n": 1},
        "better": "lower",
    }
    assert written["rows"][0]["low"] == 1.2509
    assert written["versions"]["ruvltra-edge"] == __version__
    assert written["versions"]["peer"] == "1.2"
    assert written["machine"]["cores"] >= 1
    save(path, result())
    assert json.loads(path.read_text("utf-8"))["rows"] == []


def test_a_reader_sees_value_spread_ratio_and_n() -> None:
    text = show(
        result(timed("12 tokens", "peer", "p50", "ms", [2.0, 4.0, 6.0], [1.0, 2.0, 3.0]), Row("b", "x", "y", "MB", 3))
    )
    heads = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert heads == ["12 tokens", "b"]
    first, second = [line.split() for line in text.splitlines() if line.startswith("  ")]
    assert " ".join(first) == "peer p50 4 ms [3, 5] ratio 2.00 [2.00, 2.00] n = 3"
    assert " ".join(second) == "x y 3 MB n = 1"


SLOWER = Row("12 tokens", "peer", "p50", "ms", 2.0, 1.9, 2.1, 5, 2.0, 1.9, 2.1)


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({"ratio": 2.5, "ratio_low": 2.4, "ratio_high": 2.6}, True),
        ({"ratio": 2.5, "ratio_low": 2.05, "ratio_high": 2.6}, False),  # the spreads overlap
        ({"ratio": 2.15, "ratio_low": 2.14, "ratio_high": 2.16}, False),  # within the tolerance
        ({"ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1}, False),  # better
        ({"value": 9.0, "low": 8.9, "high": 9.1}, False),  # a slower machine, the same ratio
    ],
)
def test_times_are_compared_by_their_ratio(change: dict[str, float], worse: bool) -> None:
    found, compared = compare(result(SLOWER), result(replace(SLOWER, **change)), 0.1)
    assert compared == 1
    assert bool(found) == worse
    if worse:
        assert found == ["12 tokens: peer, p50 ratio 2 -> 2.5"]


@pytest.mark.parametrize("unit", ["ms", "s", "texts/s"])
def test_times_of_another_machine_are_no_evidence(unit: str) -> None:
    alone = Row("12 tokens", "ours", "p50", unit, 1.0, 0.9, 1.1, 5)
    assert compare(result(alone), result(replace(alone, value=9.0, low=8.9, high=9.1)), 0.1) == ([], 0)
    # One of the two has a ratio: that is not enough either.
    assert compare(result(replace(alone, ratio=1.0)), result(replace(alone, value=9.0)), 0.1) == ([], 0)


def test_higher_may_be_better() -> None:
    share = Row("test split", "mini, hybrid", "accuracy", "share", 0.94, 0.93, 0.95, 3000, better="higher")
    less = replace(share, value=0.80, low=0.79, high=0.81)
    assert compare(result(share), result(less), 0.01) == (
        ["test split: mini, hybrid, accuracy value 0.94 -> 0.8"],
        1,
    )
    assert compare(result(less), result(share), 0.01) == ([], 1)
    assert compare(result(share), result(replace(share, value=0.80, low=0.60, high=0.94)), 0.01) == ([], 1)
    rate = replace(SLOWER, unit="texts/s", better="higher")
    halved = replace(rate, ratio=1.0, ratio_low=0.9, ratio_high=1.1)
    assert len(compare(result(rate), result(halved), 0.1)[0]) == 1
    assert compare(result(halved), result(rate), 0.1) == ([], 1)


def test_a_figure_without_spread_is_held_to_the_tolerance() -> None:
    size = Row("bundle", "mini", "size", "MB", 25.0)
    assert compare(result(size), result(replace(size, value=26.0)), 0.1) == ([], 1)
    assert compare(result(size), result(replace(size, value=30.0)), 0.1)[0] == ["bundle: mini, size value 25 -> 30"]


def test_only_rows_of_both_results_are_compared(tmp_path: Path) -> None:
    others = [replace(SLOWER, case="48 tokens"), replace(SLOWER, subject="new"), replace(SLOWER, measure="p99")]
    assert compare(result(SLOWER), result(*[replace(row, ratio=9.0, ratio_low=9.0) for row in others]), 0.1) == ([], 0)
    path = tmp_path / "old.json"
    save(path, result(SLOWER, *others))
    worse = replace(SLOWER, ratio=3.0, ratio_low=2.9, ratio_high=3.1)
    found, compared = compare(json.loads(path.read_text("utf-8")), result(worse, *others), 0.1)
    assert (len(found), compared) == (1, 4)


def test_what_is_not_installed_has_no_version() -> None:
    assert set(versions(("numpy", "no-such-package-of-anybody"))) == {"numpy"}
