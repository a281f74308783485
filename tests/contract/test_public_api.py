from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import edge

# Runs a program in which any use of a socket ends the process with an error that nothing catches.
GUARD = """
import os, sys
def guard(event, args):
    if event.startswith("socket.") or event == "urllib.Request":
        sys.stderr.write(f"network used: {event} {args}\\n")
        os._exit(99)
sys.addaudithook(guard)
"""


def run(program: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", GUARD + textwrap.dedent(program)], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_exports_are_exactly_these() -> None:
    assert edge.__all__ == [
        "STRATEGIES",
        "Agent",
        "AgentError",
        "BackendError",
        "Bundle",
        "BundleError",
        "ChecksumError",
        "Decision",
        "EdgeError",
        "Encoder",
        "InputError",
        "ManifestError",
        "MissingExtra",
        "OutputError",
        "ProviderUnavailable",
        "Ranked",
        "Router",
        "VersionError",
        "load_agents",
    ]
    assert all(hasattr(edge, name) for name in edge.__all__)


def test_importing_takes_no_heavy_package_and_no_socket(tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "onnx", "huggingface_hub", "matplotlib", "export", "requests"}
    loaded = run("import edge, edge.cli; print(*{name.split('.')[0] for name in sys.modules})", tmp_path).split()
    assert not heavy & set(loaded)


def test_routes_from_any_folder_without_arguments_or_network(tmp_path: Path) -> None:
    program = """
        from edge import Router
        print(Router.load().route("Fix the null pointer in the login handler").agent)
        print(*{"torch", "transformers"} & set(sys.modules))
    """
    assert run(program, tmp_path).split() == ["debugger"]


def test_the_guard_itself_works(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", GUARD + "import socket; socket.create_connection(('127.0.0.1', 9))"],
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 99


def test_edge_never_imports_export() -> None:
    for path in Path(edge.__file__).parent.glob("*.py"):
        assert "import export" not in path.read_text(encoding="utf-8")
        assert "from export" not in path.read_text(encoding="utf-8")


def test_every_message_ends_with_what_to_do() -> None:
    """Each error raised in the sources has at least two sentences: what is wrong, and what to do."""
    assert str(edge.MissingExtra("--plot", "bench")).endswith("pip install 'ruvltra-edge[bench]'")
