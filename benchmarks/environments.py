"""Environments of their own for what the benchmarks measure, made when they are first needed.

Each lies in ``WORK/environments`` under a name with a hash of what was asked for. ``installed.json``, written last,
marks it as complete: what an interrupted installation has left is made anew. Where torch comes from is for pip's
configuration to say: on Linux PyPI's build is for CUDA and takes several GB, so point PIP_FIND_LINKS or
PIP_EXTRA_INDEX_URL (UV_FIND_LINKS, UV_EXTRA_INDEX_URL) at a CPU build.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import ENVIRONMENTS, Environment
from benchmarks.record import ROOT

WORK = ROOT / "benchmarks" / ".work"

_LIST = """
import importlib.metadata, json
print(json.dumps({each.name.lower(): each.version for each in importlib.metadata.distributions()}))
"""


class Unavailable(Exception):
    """Something cannot be made on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A complete environment.

    Attributes:
        folder: Where it lies.
        versions: Of everything in it, by package.
    """

    folder: Path
    versions: dict[str, str]

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(_python(self.folder))


def environment(name: str, work: Path) -> Installed:
    """An environment by its name, made if need be.

    Raises:
        Unavailable: It could not be installed.
    """
    wanted = ENVIRONMENTS[name]
    folder = work / "environments" / f"{name}-{_digest(wanted)}"
    mark = folder / "installed.json"
    if not mark.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"{name}: installing {', '.join(wanted.requirements)} ...", file=sys.stderr, flush=True)
        versions = _install_npm(folder, wanted) if wanted.npm else _install(folder, wanted)
        part = mark.with_name("installed.json.partial")
        part.write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        part.replace(mark)
        if wanted.checkout:  # of earlier states of the checkout
            for old in folder.parent.glob(f"{name}-*"):
                if old != folder:
                    shutil.rmtree(old)
    return Installed(folder, json.loads(mark.read_text("utf-8")))


def _install(folder: Path, wanted: Environment) -> dict[str, str]:
    requirements = [*wanted.requirements, *([str(ROOT)] if wanted.checkout else [])]
    python = _python(folder)
    variables = dict(wanted.variables)
    uv = shutil.which("uv")
    if uv:
        _run([uv, "venv", "--quiet", str(folder)], folder, {})
        _run([uv, "pip", "install", "--python", str(python), *requirements], folder, variables)
    else:
        _run([sys.executable, "-m", "venv", str(folder)], folder, {})
        _run([str(python), "-m", "pip", "install", *requirements], folder, variables)
    found: dict[str, str] = json.loads(_run([str(python), "-c", _LIST], folder, {}))
    return found


def _install_npm(folder: Path, wanted: Environment) -> dict[str, str]:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("there is no npm on PATH. Install Node.js 18 or newer.")
    (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    _run([npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", *wanted.requirements], folder, {})
    found = json.loads(_run([npm, "ls", "--all", "--json"], folder, {}))["dependencies"]
    return {name: each["version"] for name, each in found.items()}


def _run(command: list[str], folder: Path, variables: dict[str, str]) -> str:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        (folder / "failed.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise Unavailable(f"{' '.join(command[:4])} failed ({last.strip()}). {folder / 'failed.log'} has all of it.")
    return done.stdout


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _digest(wanted: Environment) -> str:
    parts = [repr(wanted), sys.version.split()[0]]
    if wanted.checkout:
        bundle = ROOT / "models" / "ruvltra-mini" / "bundle" / "bundle.json.sha256"
        files = [ROOT / "pyproject.toml", bundle, *sorted((ROOT / "edge").rglob("*.py"))]
        parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]
