from __future__ import annotations

import math
from pathlib import Path

import pytest

from edge import InputError, Router
from edge.evaluate import Labelled, Proportion, auroc, calibration_error, evaluate, plot_confusion, read_labelled


def test_wilson_interval_by_hand() -> None:
    # Wilson (1927) for 8 of 10 at z = 1.96, as in standard tables.
    share = Proportion.of(8, 10)
    assert share.low == pytest.approx(0.4902, abs=1e-4)
    assert share.high == pytest.approx(0.9433, abs=1e-4)
    everything = Proportion.of(20, 20)
    assert everything.high == 1.0
    assert everything.low == pytest.approx(0.8389, abs=1e-4)
    assert str(Proportion.of(0, 0)) == "-"


def test_auroc_by_pairs() -> None:
    inside, outside = [0.9, 0.4, 0.4, 0.7], [0.4, 0.1, 0.8]
    pairs = [(i > o) + 0.5 * (i == o) for i in inside for o in outside]
    assert auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(inside, []) is None


def test_calibration_error_by_hand() -> None:
    # Two bins: 0.9 confident and always right (gap 0.1), 0.5 confident and never right (gap 0.5).
    assert calibration_error([(0.9, True), (0.9, True), (0.5, False), (0.5, False)]) == pytest.approx(0.3)
    assert calibration_error([(1.0, True)]) == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"),
        ("{}\n", ":1: not a row"),
        ('{"task": "x", "agent": "coder"}\nhello\n', ":2: not valid JSON"),
        ('\n{"task": "x", "agent": "cook"}\n', ":2: agent 'cook' is not one of coder, none"),
        ("[1]\n", ":1: not a row"),
    ],
)
def test_broken_label_files_name_the_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_labelled(path, ["coder"])


def test_missing_label_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_labelled(tmp_path / "no.jsonl", ["coder"])


ROWS = [
    Labelled("Fix the null pointer in the login handler", "debugger"),
    Labelled("Write unit tests for the parser", "tester"),
    Labelled("Write unit tests for the parser", "planner"),
    Labelled("", "coder"),
    Labelled("what shall I cook tonight?", "none"),
]


def test_scores_count_what_the_router_decides(router: Router) -> None:
    scores = {score.strategy: score for score in evaluate(router, ROWS, ("keyword", "hybrid"))}
    hybrid = scores["hybrid"]
    assert (hybrid.accuracy.hits, hybrid.accuracy.n) == (2, 4)
    assert (hybrid.false_abstain.hits, hybrid.abstain_recall.hits) == (1, 1)
    assert hybrid.abstain_precision.value == 0.5
    assert ("planner", "tester", 1) in hybrid.confusions
    assert hybrid.per_agent["debugger"].value == 1.0
    assert sum(hybrid.matrix.values()) == len(ROWS)
    assert 0 <= hybrid.ece <= 1
    assert math.isclose(hybrid.auroc or 0, 0.75)  # the empty task ranks with the one out of scope
    alone = Router.load(strategy="keyword")
    assert scores["keyword"] == evaluate(alone, ROWS, ("keyword",))[0]


def test_plot_is_a_picture(router: Router, tmp_path: Path) -> None:
    score = evaluate(router, ROWS, ("hybrid",))[0]
    plot_confusion(score, tmp_path / "confusion.png", "test")
    assert (tmp_path / "confusion.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(InputError, match="cannot be written"):
        plot_confusion(score, tmp_path / "missing" / "confusion.png", "test")
