"""A whole process, from its start to the first answer, beside what a user would pick instead and beside bare imports.

    python -m benchmarks.cold [--quick] [--peers A,B] [--gguf FILE] [--json OUT]

Processes run in turn; the figure of a round is one process. Ratios are to a Python process that only imports numpy,
onnxruntime and tokenizers. Nothing limits the threads: each takes what it takes by itself.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import record, texts
from benchmarks.peers.start import Ready, check, parser, prepare, report
from benchmarks.race import Worker
from edge.device import detect

TEXT = "Fix the null pointer in the login handler"
LAUNCHER = Path(__file__).parent / "peers" / "launch.py"
IMPORTS = "import of numpy, onnxruntime, tokenizers"
_FIRST = {"encode": ("vectors", "first vector"), "route": ("agents", "first decision")}


def commands(ready: Sequence[Ready]) -> dict[str, list[str]]:
    """What runs, by subject."""
    ours = next(each.installed.python for each in ready if each.peer.environment == "ours")
    found = {IMPORTS: [ours, "-c", "import numpy, onnxruntime, tokenizers"]}
    found["import of onnxruntime"] = [ours, "-c", "import onnxruntime"]
    cores = detect().threads
    for each in ready:
        subject = each.peer.subject
        if each.peer.loader == "ours":
            for do, command in (("route", "first decision"), ("embed", "first vector")):
                found[f"{subject}, {command}"] = [ours, "-m", "edge.cli", do, "--bundle", each.model, TEXT]
            continue
        for do in each.peer.asks:
            if do in _FIRST:
                question, answer = _FIRST[do]
                asked = [] if each.peer.loader.endswith(".js") else ["--do", question]
                found[f"{subject}, {answer}"] = [*each.command(cores), "--once", TEXT, *asked]
    return found


def measure(wanted: Mapping[str, Sequence[str]], rounds: int) -> list[record.Row]:
    """Rows of seconds and memory."""
    found: dict[str, list[tuple[float, float]]] = {subject: [] for subject in wanted}
    names = list(wanted)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    launcher = Worker([sys.executable, "-I", "-S", str(LAUNCHER)], offline)
    with tempfile.TemporaryDirectory() as folder:  # elsewhere, so that the installed package is taken
        for number in tqdm(range(rounds + 1), "processes", leave=False):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                once = launcher.ask(command=wanted[name], folder=folder)
                if number:  # the first round only fills the system's cache of files
                    found[name].append((once["seconds"], once["peak"] / 1e6))
    launcher.close()
    rows = []
    for at, (measure_of, unit) in enumerate((("wall", "s"), ("peak", "MB"))):
        case = "one process, wall time" if unit == "s" else "one process, peak memory"
        beside = [once[at] for once in found[IMPORTS]]
        rows += [record.timed(case, n, measure_of, unit, [once[at] for once in found[n]], beside) for n in names]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    options = parser(__doc__).parse_args(arguments)
    ready, notes = prepare(options)
    ready, checked = check(ready, texts.shuffled(texts.tasks())[:24])
    rows = measure(commands(ready), 3 if options.quick else 7)
    report("cold", rows, [f"ratios are to: {IMPORTS}", *notes, *checked], ready, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
