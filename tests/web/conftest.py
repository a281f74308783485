"""The JavaScript module in headless Chromium and in Node, held against Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge import Bundle, Router
from tests.conftest import ROOT
from tests.doors.conftest import no_network  # noqa: F401 (a fixture: loopback alone)

WEB = ROOT / "edge" / "web"
HERE = Path(__file__).parent
LACKING = [
    what
    for what, there in (
        ("node", shutil.which("node")),
        ("/usr/bin/chromium", Path("/usr/bin/chromium").is_file()),
        ("edge/web/node_modules (npm ci --ignore-scripts)", (WEB / "node_modules" / "playwright-core").is_dir()),
        ("edge/web/vendor (npm run build)", (WEB / "vendor").is_dir()),
    )
    if not there
]


@pytest.fixture(scope="session", autouse=True)
def equipped() -> None:
    """Skipped where a browser is missing; `.ci/run`, which installs it, may not skip."""
    if LACKING:
        (pytest.fail if os.environ.get("RUVLTRA_CI") else pytest.skip)(f"not here: {', '.join(LACKING)}")


def node(script: str, request: dict[str, Any]) -> Any:
    """What a script of this folder makes of a request."""
    done = subprocess.run(
        ["node", HERE / script], input=json.dumps(request), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def browse(address: str, script: str, **request: Any) -> Any:
    """What a script of page.mjs sees of the page; nothing may be fetched from elsewhere, or go wrong."""
    seen = node("page.mjs", {"address": address, "script": script, **request})
    assert seen["foreign"] == []
    assert seen["complaints"] == []
    return seen["result"]


def playground(*arguments: str) -> Iterator[str]:
    """The address of a page that is served while it is used."""
    command = [sys.executable, "-m", "edge.cli", "playground", "--no-open", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            assert process.wait(30) == 0


@pytest.fixture(scope="session")
def address(equipped: None) -> Iterator[str]:  # noqa: ARG001 (skips before anything starts)
    yield from playground("--bundle", str(ROOT / "models" / "ruvltra-mini" / "bundle"))


@pytest.fixture(scope="session")
def own(bundle: Bundle) -> tuple[list[dict[str, Any]], Router]:
    """Agents of one's own, as JavaScript takes them, and Python's router of them."""
    from edge import Agent

    agents = [
        Agent(
            "dba", "Postgres schema, indexes, slow queries.", keywords=("postgres", "c++"), examples=("add an index",)
        ),
        Agent("mobile", "iOS and Android apps, Swift, Kotlin.", keywords=("straße", "app"), negatives=("app store",)),
        Agent("web", "React components, CSS, layout.", priority=5, keywords=("css", "layout")),
    ]
    fields = ("name", "description", "keywords", "negatives", "examples", "priority")
    listed = [{name: getattr(agent, name) for name in fields} for agent in agents]
    return [{k: list(v) if isinstance(v, tuple) else v for k, v in row.items()} for row in listed], Router.load(
        bundle, agents=agents
    )
