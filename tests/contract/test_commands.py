"""Documented commands: those of ```console blocks run, and all of them are what a parser takes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(console|text|sh)\n(.*?)^```", re.S | re.M)
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?(ruvltra(?:-export)?) (.*)$")
VERBS = "route|embed|generate|capabilities|eval|memory|index|mcp|serve|playground|hook|inspect|device|tune|doctor"
MADE = (
    "bundle|finetune|fetch|inspect|verify|split|mine-commits|soft-labels|calibrate|keywords|capabilities|shrink|unpack"
)


def sessions() -> list[object]:
    """The console blocks of each page, in order: later ones may use what earlier ones have made."""
    found = {
        page: [code for kind, code in BLOCK.findall(page.read_text("utf-8")) if kind == "console"] for page in PAGES
    }
    return [pytest.param(codes, id=page.name) for page, codes in found.items() if codes]


def commands() -> list[object]:
    """Each documented command of ours: its program and its words."""
    found = []
    for page in PAGES:
        if page.name == "cli.md":  # made from the parsers themselves
            continue
        for _, code in BLOCK.findall(page.read_text("utf-8")):
            for line in re.sub(r"\\\n\s*", " ", code).splitlines():
                match = COMMAND.match(line)
                if match is None or not re.match(rf"(?:{VERBS}|{MADE})\b", match[2]):
                    continue
                text = re.split(r"\s(?:\||\|\||&&|<|>|2>)\s|\s#\s", match[2])[0]
                if text.count('"') % 2 or "..." in text:  # a text of several lines; any further arguments
                    continue
                text = re.sub(r"\[([^\]]*)\]", r"\1", re.sub(r"\$\([^)]*\)", "X", text))
                found.append(pytest.param(match[1], shlex.split(text), id=f"{page.name}: {line[:60]}"))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the examples speak of."""
    agents = tmp_path / ".claude" / "agents"
    agents.mkdir(parents=True)
    for name, description in (("dba", "Postgres schema, indexes, slow queries, vacuum."), ("web", "React pages, CSS.")):
        (agents / f"{name}.md").write_text(f"---\nname: {name}\ndescription: {description}\n---\n", "utf-8")
    for name in ("tasks", "texts", "requests"):
        (tmp_path / f"{name}.txt").write_text("fix the login page\nquantize my vectors\n", "utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "deploy.md").write_text("# Deploying\n\nWe deploy by a tag.\n", "utf-8")
    (tmp_path / "facts.jsonl").write_text('{"text": "Orders are kept in PostgreSQL", "id": "orders"}\n', "utf-8")
    return tmp_path


@pytest.mark.parametrize("codes", sessions())
def test_sessions_run(codes: list[str], folder: Path) -> None:
    if shutil.which("ruvltra", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("ruvltra is not installed beside this interpreter")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(folder), "GIT_DIR": str(ROOT / ".git")}
    environment.pop("CLAUDE_PROJECT_DIR", None)
    for code in codes:
        lines = [line.removeprefix("$ ") for line in code.splitlines() if line.startswith("$ ")]
        assert lines
        if not (ROOT / ".git").exists():  # a copy of the files
            lines = [line for line in lines if not line.startswith("git ")]
        for line in lines:
            done = subprocess.run(
                ["bash", "-eo", "pipefail", "-c", line],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.parametrize(("program", "words"), commands())
def test_commands_are_what_the_parser_takes(program: str, words: list[str]) -> None:
    if program == "ruvltra":
        import edge.cli as cli
    else:
        cli = pytest.importorskip("export.cli")
    cli._parser().parse_args(words)  # says on standard error what it does not take, and exits


def test_there_are_commands() -> None:
    assert len(sessions()) >= 4
    assert len(commands()) > 40
