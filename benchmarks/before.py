"""Is this checkout quicker than another commit? Both route the same tasks in turn, each with its own bundles.

    python -m benchmarks before COMMIT [--rounds N] [--json OUT]

One thread, tasks of 12 tokens. The other commit's code and bundles are unpacked into a temporary folder. "Session" is
the network alone, run by itself; ratios are to the other commit in the same round.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks import texts
from benchmarks.race import Worker
from benchmarks.record import ROOT, Row, document, save, show, timed

BUNDLES = ("ruvltra-mini", "ruvltra-nano")
_WORKER = """
import json, statistics, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
import edge
from edge import Router
assert edge.__file__.startswith(sys.argv[1]), edge.__file__
router = Router.load(sys.argv[2], device="cpu", threads=1)
session = router.encoder._backend._sessions[0]
print(json.dumps({"load": 0}), flush=True)
for line in sys.stdin:
    tasks = json.loads(line)["tasks"]
    ids = [np.array([router.encoder.tokenize(task).ids]) for task in tasks]
    found = {"route": [], "session": []}
    for number in range(40):
        place = number % len(tasks)
        start = time.perf_counter()
        router.route(tasks[place])
        found["route"].append(time.perf_counter() - start)
    for number in range(40):
        fed = {"input_ids": ids[number % len(ids)], "attention_mask": np.ones_like(ids[number % len(ids)])}
        start = time.perf_counter()
        session.run(None, fed)
        found["session"].append(time.perf_counter() - start)
    print(json.dumps({what: statistics.median(times) for what, times in found.items()}), flush=True)
"""


def measure(folders: dict[str, Path], rounds: int) -> list[Row]:
    """Rows by bundle; ratios are to the first folder's."""
    tasks = texts.exactly(12, 5)
    rows = []
    for bundle in BUNDLES:
        workers = {}
        for name, folder in folders.items():
            place = str(folder / "models" / bundle / "bundle")
            workers[name] = Worker([sys.executable, "-c", _WORKER, str(folder), place])
        found: dict[str, dict[str, list[float]]] = {
            what: {name: [] for name in workers} for what in ("route", "session")
        }
        names = list(workers)
        for number in tqdm(range(rounds), desc=bundle, leave=False):
            for name in names if number % 2 else reversed(names):
                answer = workers[name].ask(tasks=tasks)
                for what, times in found.items():
                    times[name].append(1e3 * answer[what])
        for what, times in found.items():
            for name, values in times.items():
                rows.append(timed(f"{bundle}, 12 tokens, {what}", name, "p50", "ms", values, times[names[0]]))
        for worker in workers.values():
            worker.close()
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(arguments)
    parts = ["edge", *(f"models/{bundle}/bundle" for bundle in BUNDLES)]
    packed = subprocess.run(["git", "archive", options.commit, *parts], cwd=ROOT, capture_output=True)
    if packed.returncode:
        parser.error(f"{options.commit} cannot be unpacked ({packed.stderr.decode().strip()}). Name a commit.")
    with tempfile.TemporaryDirectory() as name:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(name, filter="data")
        rows = measure({options.commit: Path(name), "this checkout": ROOT}, options.rounds)
    notes = {"ratios": f"to {options.commit}, in the same round"}
    result = document("before and now", rows, quick=False, packages={}, notes=notes)
    print(show(result))
    if options.json:
        save(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
