"""The door to the benchmarks, and the comparison of their results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_question_that_is_listed_can_be_asked() -> None:
    from benchmarks.__main__ import QUESTIONS

    listed = run().stdout
    for name in QUESTIONS:
        assert f"  {name} " in listed
        assert importlib.util.find_spec(f"benchmarks.{name}") is not None


def test_an_unknown_question_names_the_known_ones() -> None:
    asked = run("lateny")
    assert asked.returncode == 2
    assert "latency" in asked.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_what_they_are_of(path: Path) -> None:
    result = json.loads(path.read_text("utf-8"))
    assert result["machine"]["cpu"]
    assert result["versions"]["onnxruntime"]
    assert not result["quick"], "a quick run is no result"
    assert all(row["n"] >= 1 and row["value"] is not None for row in result["rows"])


def test_a_result_is_no_worse_than_itself_and_a_slower_one_is(tmp_path: Path) -> None:
    path = ROOT / "benchmarks" / "results" / "latency.json"
    assert run("--check", str(path), str(path)).returncode == 0
    slower = json.loads(path.read_text("utf-8"))
    for row in slower["rows"]:
        if row["subject"] == "ruvltra-nano, encode":
            for key in ("ratio", "ratio_low", "ratio_high"):
                row[key] *= 2
    changed = tmp_path / "slower.json"
    changed.write_text(json.dumps(slower), encoding="utf-8")
    checked = run("--check", str(path), str(changed))
    assert checked.returncode == 1
    assert checked.stdout.count("worse: ") == 3
    assert "ruvltra-nano, encode" in checked.stdout


def test_results_of_different_questions_are_not_compared() -> None:
    names = [str(ROOT / "benchmarks" / "results" / f"{name}.json") for name in ("latency", "cold")]
    checked = run("--check", *names)
    assert checked.returncode == 2
    assert "different questions" in checked.stderr
