"""Peers made ready to be asked: environment, model, process, and the proof that they compute what they are held to."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bars import bars
from benchmarks.environments import WORK, Installed, Unavailable, environment
from benchmarks.peers import ENVIRONMENTS, PEERS, Peer
from benchmarks.race import Worker
from benchmarks.record import ROOT, Row, document, save, show

MINI = ROOT / "models" / "ruvltra-mini"
CHECKPOINT = MINI / "checkpoint"
REFERENCE = "mini-int8"  # what ratios are to
FAITHFUL = "mini-fp32"  # what vectors are held against
EXAMPLES = 10  # utterances a route of semantic-router

_HERE = Path(__file__).parent
# Where a model is made by a peer's own tools, and what of.
_TOOLS = {
    "checkpoint": ("sentences", ""),
    "onnx": ("sentences", "checkpoint"),
    "openvino": ("openvino", "checkpoint"),
    "static": ("distil", "checkpoint"),
    "gguf": ("", "checkpoint"),
}


@dataclass(frozen=True, slots=True)
class Ready:
    """A peer that can be started."""

    name: str
    peer: Peer
    installed: Installed
    model: str

    def command(self, threads: int, use: str = "latency") -> list[str]:
        """The process that answers questions."""
        if ENVIRONMENTS[self.peer.environment].npm:
            return ["node", str(_HERE / self.peer.loader), str(self.installed.folder), self.name]
        options = ["--model", self.model, "--file", self.peer.file, "--threads", str(threads), "--use", use]
        return [self.installed.python, str(_HERE / "worker.py"), self.peer.loader, *options]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that the questions share."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="few rounds")
    made.add_argument("--json", type=Path, metavar="OUT")
    made.add_argument("--peers", metavar="A,B", help=f"some of: {', '.join(PEERS)}")
    made.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="where environments and models lie")
    made.add_argument("--gguf", type=Path, metavar="FILE", help="a causal model for llama.cpp")
    return made


def prepare(options: argparse.Namespace) -> tuple[list[Ready], list[str]]:
    """Make ready the peers that were asked for, the reference first; and say why one could not be."""
    names = list(PEERS) if options.peers is None else options.peers.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise SystemExit(f"unknown peer {', '.join(unknown)}. There are: {', '.join(PEERS)}.")
    if options.gguf is None and options.peers is None:
        names.remove("llama-causal")
    work = options.work.resolve()
    ready, notes = [], []
    for name in dict.fromkeys((REFERENCE, FAITHFUL, *names)):
        peer = PEERS[name]
        try:
            installed = environment(peer.environment, work)
            model = _model(name, work, options.gguf)
        except Unavailable as error:
            notes.append(f"{peer.subject}: left out, {error}")
            print(notes[-1], file=sys.stderr)
            continue
        ready.append(Ready(name, peer, installed, str(model)))
        if peer.note:
            notes.append(f"{peer.subject}: {peer.note}")
    return ready, notes


def check(ready: Sequence[Ready], texts: list[str]) -> tuple[list[Ready], list[str]]:
    """Hold the vectors of peers of the same backbone against our fp32 ones; those that differ are refused."""
    faithful = next(each for each in ready if each.name == FAITHFUL)
    expected = _vectors(faithful, texts)
    kept, notes = [], []
    for each in ready:
        peer = each.peer
        try:
            found = _vectors(each, texts) if "encode" in peer.asks else None
        except RuntimeError as error:
            notes.append(f"{peer.subject}: left out, it does not run ({error})")
            print(notes[-1], file=sys.stderr)
            continue
        if found is None or peer.bound is None:
            kept.append(each)
            continue
        lowest = float((found * expected).sum(1).min())
        if lowest < peer.bound:
            notes.append(f"{peer.subject}: left out, cosine {lowest:.4f} to our fp32 vectors, below {peer.bound}")
        else:
            kept.append(each)
            notes.append(f"{peer.subject}: cosine to our fp32 vectors at least {lowest:.5f} ({len(texts)} texts)")
        print(notes[-1], file=sys.stderr)
    return kept, notes


def versions(ready: Sequence[Ready]) -> dict[str, str]:
    """Of what was asked for in each environment, by environment and package."""
    found = {}
    for each in ready:
        name = each.peer.environment
        for requirement in ENVIRONMENTS[name].requirements:
            package = requirement.rpartition("@")[0] or requirement.partition("==")[0].partition("[")[0]
            have = each.installed.versions
            version = have.get(package) or have.get(package.replace("-", "_"))
            found[f"{name}: {package}"] = version or "?"
    return found


def report(question: str, rows: Sequence[Row], notes: list[str], ready: Sequence[Ready], options: Any) -> None:
    """Print a result with its notes and bars, and write it where that was asked for."""
    result = document(question, rows, quick=options.quick, packages=versions(ready), notes=notes)
    print(show(result), bars(result), *["", *notes], sep="\n")
    if options.json:
        save(options.json, result)


def _vectors(each: Ready, texts: list[str]) -> np.ndarray[Any, Any]:
    worker = Worker(each.command(1))
    try:
        rows = np.array(worker.ask(do="vectors", texts=texts)["vectors"])
    finally:
        worker.close()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _model(name: str, work: Path, causal: Path | None) -> Path | str:
    """The files a peer loads, made if need be."""
    wanted = PEERS[name].model
    if name == "llama-causal":
        if causal is None or not causal.is_file():
            raise Unavailable("it needs --gguf FILE.")
        return causal.resolve()
    if not wanted:
        return ""
    if wanted == "mini-int8":
        return MINI / "bundle"
    if wanted == "nano":
        return ROOT / "models" / "ruvltra-nano" / "bundle"
    return made(wanted, work)


def made(name: str, work: Path) -> Path:
    """The folder of a model of this name, made by the first call."""
    tools, source = _TOOLS.get(name, ("", ""))
    installed = environment(tools, work) if tools else None
    parts = hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes())
    parts.update(("" if installed is None else installed.folder.name).encode())
    makers = sorted((ROOT / "export").rglob("*.py")) if name == "mini-fp32" else [_HERE / "models.py"]
    for file in makers:
        parts.update(file.read_bytes())
    folder = work / "models" / f"{name}-{parts.hexdigest()[:10]}"
    if folder.exists():
        return folder
    origin = made(source, work) if source else CHECKPOINT
    part = folder.with_name(folder.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    print(f"{name}: making {folder} ...", file=sys.stderr, flush=True)
    if name == "mini-fp32":
        command = [sys.executable, "-m", "export.cli", "bundle", str(CHECKPOINT)]
        command += ["--recipe", str(MINI / "recipe.toml"), "--variants", "fp32", "--out", str(part / "bundle")]
        _run(command, part)
        part = part / "bundle"
    else:
        python = sys.executable if installed is None else installed.python
        extra = [str(_calibration(work))] if name == "openvino" else []
        _run([python, str(_HERE / "models.py"), name, str(origin), str(part), *extra], part)
        if name == "checkpoint":
            (part / "routes.json").write_text(json.dumps(_routes(), indent=1), encoding="utf-8")
    part.rename(folder)
    shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
    return folder


def _run(command: list[str], folder: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True)
    if done.returncode:
        (folder / "failed.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise Unavailable(f"its model could not be made ({last.strip()}). {folder / 'failed.log'} has all of it.")


def _tasks(file: Path) -> list[str]:
    return [json.loads(line)["task"] for line in file.read_text("utf-8").splitlines()]


def _routes() -> dict[str, list[str]]:
    """An agent's description and its first tasks of the training data: the bundle's agents have no examples."""
    agents = json.loads((MINI / "bundle" / "agents.json").read_text("utf-8"))["agents"]
    return {
        agent["name"]: [agent["description"], *_tasks(MINI / "data" / f"{agent['name']}.jsonl")[:EXAMPLES]]
        for agent in agents
    }


def _calibration(work: Path) -> Path:
    """A local data set of tasks, as `datasets` reads one."""
    folder = work / "models" / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = _tasks(MINI / "splits" / "dev.jsonl")
    lines = [json.dumps({"task": task}) + "\n" for task in tasks]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
