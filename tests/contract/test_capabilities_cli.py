"""``ruvltra capabilities``, as a user types it."""

from __future__ import annotations

import io
import json
import sys

import pytest

from edge.cli import main
from tests.conftest import ROOT


def test_json_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"walk me through the setup\n\nquantize vectors\n")))
    assert main(["capabilities", "--json", "-k", "2", "-"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["query"] for row in rows] == ["walk me through the setup", "", "quantize vectors"]
    assert [len(row["hits"]) for row in rows] == [2, 0, 2]
    assert rows[0]["hits"][0]["id"] == "claude-flow/command/init wizard"
    assert rows[0]["hits"][0]["also"] == ["agentic-flow/command/init wizard"]
    assert 0.5 < rows[0]["hits"][0]["score"] <= 1
    assert all(row["ms"] > 0 for row in rows)
    assert main(["capabilities", "--json", "--ecosystem", "agentic-flow", "walk me through the setup"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(row["hits"]) == 5
    assert row["hits"][0]["id"] == "agentic-flow/command/init wizard"


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capabilities", "-k", "1", "walk me through the setup", " "]) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first.endswith("claude-flow/command/init wizard  (also agentic-flow/command/init wizard)")
    assert second.startswith("      Sub-command")
    assert rest == ["", "nothing is asked for"]


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capabilities", "--ecosystem", "npm", "x"]) == 1
    assert "Choose one of: claude-flow, agentic-flow, ruvector" in capsys.readouterr().err
    assert main(["capabilities", "--bundle", str(ROOT / "models" / "ruvltra-nano" / "bundle"), "x"]) == 1
    assert "no catalogue of capabilities" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["capabilities", "-k", "0", "x"])
    assert "whole number from 1" in capsys.readouterr().err
