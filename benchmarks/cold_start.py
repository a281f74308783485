"""Whole-process time and memory of `ruvltra route TEXT` against merely importing what it is made of.

    python -m benchmarks.cold_start [--runs N] [--json OUT]

The two processes run in turn, A B A B; the ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROUTE = [sys.executable, "-m", "edge.cli", "route", "Fix the null pointer in the login handler"]
IMPORTS = [sys.executable, "-c", "import numpy, onnxruntime, tokenizers"]
ONNXRUNTIME = [sys.executable, "-c", "import onnxruntime"]


def run(command: list[str], folder: str) -> tuple[float, float]:
    """Seconds and the largest resident memory in MB of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes, or kilobytes
    return time.perf_counter() - started, usage.ru_maxrss * unit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    ratios = []
    runs: dict[str, list[tuple[float, float]]] = {"route": [], "imports": [], "onnxruntime": []}
    with tempfile.TemporaryDirectory() as folder:  # elsewhere, so that the installed package is taken
        for command in (ROUTE, IMPORTS, ONNXRUNTIME):
            run(command, folder)
        for _ in range(options.runs):
            for name, command in zip(runs, (ROUTE, IMPORTS, ONNXRUNTIME), strict=True):
                runs[name].append(run(command, folder))
            ratios.append(runs["route"][-1][0] / runs["imports"][-1][0])
    quartiles = statistics.quantiles(ratios, n=4)
    result: dict[str, Any] = {
        "benchmark": "cold_start",
        "machine": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "runs": options.runs,
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "median_s": {name: statistics.median(seconds for seconds, _ in each) for name, each in runs.items()},
        "median_mb": {name: statistics.median(memory for _, memory in each) for name, each in runs.items()},
    }
    what = {"route": "ruvltra route", "imports": "import of all three", "onnxruntime": "import onnxruntime"}
    for name, text in what.items():
        print(f"{text:<20} {result['median_s'][name]:.3f} s, {result['median_mb'][name]:.0f} MB")
    print(
        f"route/imports {result['ratio_median']:.2f} [{quartiles[0]:.2f}, {quartiles[2]:.2f}] (median, quartiles; "
        f"n = {options.runs}); {result['machine']}, Python {result['python']}"
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump(result, stream, indent=2)


if __name__ == "__main__":
    main()
