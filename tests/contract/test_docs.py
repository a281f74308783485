"""What the documentation shows runs, and what is generated is current."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from edge import load_agents
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(kind, code, id=f"{page.name}:{kind}:{number}")
    for page in PAGES
    for number, (kind, code) in enumerate(
        re.findall(r"^```(python|toml)\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)
    )
]


@pytest.mark.parametrize(("kind", "code"), BLOCKS)
def test_examples_run(kind: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BUNDLE", str(ROOT / "models" / "ruvltra-mini" / "bundle"))
    if kind == "python":
        exec(compile(code, "example", "exec"), {"__name__": "example"})
    else:
        (tmp_path / "agents.toml").write_text(code, encoding="utf-8")
        assert load_agents(tmp_path / "agents.toml")


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 4


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_figures_are_those_of_the_results() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate_benchmarks.py"))
    assert made["page"]() == (ROOT / "docs" / "benchmarks.md").read_text("utf-8"), "run: docs/generate_benchmarks.py"
    assert len(made["FILLED"]) == 5
    for path in made["FILLED"]:
        text = path.read_text("utf-8")
        assert text.count("<!-- figures:") == text.count("<!-- end of figures -->") > 0
        assert made["filled"](text) == text, f"{path.name}: run: python docs/generate_benchmarks.py"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse lays help out differently in other versions")
def test_the_command_line_page_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("export.cli")
    monkeypatch.setenv("COLUMNS", "100")
    generated = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))["page"]()
    assert generated == (ROOT / "docs" / "cli.md").read_text("utf-8"), "run: python docs/generate_cli.py"
