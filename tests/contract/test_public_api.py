from __future__ import annotations

import ast
import re
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
        "Capabilities",
        "Capability",
        "ChecksumError",
        "Decision",
        "EdgeError",
        "EdgeWarning",
        "Encoder",
        "Generator",
        "Hit",
        "Index",
        "InputError",
        "ManifestError",
        "MemoryStore",
        "MissingExtra",
        "OutputError",
        "Placement",
        "PlacementError",
        "Provider",
        "ProviderUnavailable",
        "Ranked",
        "Router",
        "StoreError",
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
    for path in Path(edge.__file__).parent.rglob("*.py"):
        assert "import export" not in path.read_text(encoding="utf-8")
        assert "from export" not in path.read_text(encoding="utf-8")


def messages(path: Path) -> list[str]:
    """The literal text of every error that a source file raises; values in it become ``x``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            name, arguments = node.exc.func.id, node.exc.args
            if issubclass(getattr(edge, name, Exception), edge.EdgeError) and name != "MissingExtra":
                parts = arguments[0].values if isinstance(arguments[0], ast.JoinedStr) else [arguments[0]]
                found.append("".join(text_of(part) for part in parts))
    return found


def text_of(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    value = part.value if isinstance(part, ast.FormattedValue) else part
    return (
        "Copy it again."
        if isinstance(value, ast.Name) and value.id in ("_COPY_AGAIN", "_AGAIN", "_EXPORT_AGAIN", "_CORRECT")
        else "x"
    )


def test_every_message_ends_with_what_to_do() -> None:
    """Two sentences: what is wrong, and then what to do about it."""
    assert str(edge.MissingExtra("--plot", "bench")).endswith("pip install 'ruvltra-edge[bench]'")
    found = [message for path in Path(edge.__file__).parent.rglob("*.py") for message in messages(path)]
    assert len(found) > 50
    lacking = [
        message for message in found if not re.search(r"[^.]\. \S.*\S|Run: ruvltra doctor$|Copy it again\.$", message)
    ]
    assert lacking == []
