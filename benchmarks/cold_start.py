"""Whole-process time of `ruvltra route TEXT` against merely importing what it is made of.

    python -m benchmarks.cold_start [--runs N] [--json OUT]

The two processes run in turn, A B A B; the ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROUTE = [sys.executable, "-m", "edge.cli", "route", "Fix the null pointer in the login handler"]
IMPORTS = [sys.executable, "-c", "import numpy, onnxruntime, tokenizers"]


def seconds(command: list[str], folder: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    ratios, routes, imports = [], [], []
    with tempfile.TemporaryDirectory() as folder:  # elsewhere, so that the installed package is taken
        for command in (ROUTE, IMPORTS):
            seconds(command, folder)
        for _ in range(options.runs):
            routes.append(seconds(ROUTE, folder))
            imports.append(seconds(IMPORTS, folder))
            ratios.append(routes[-1] / imports[-1])
    quartiles = statistics.quantiles(ratios, n=4)
    result = {
        "benchmark": "cold_start",
        "machine": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "runs": options.runs,
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "route_median_s": statistics.median(routes),
        "imports_median_s": statistics.median(imports),
        "largest_rss_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }
    print(
        f"route {result['route_median_s']:.3f} s, imports {result['imports_median_s']:.3f} s, ratio "
        f"{result['ratio_median']:.2f} [{quartiles[0]:.2f}, {quartiles[2]:.2f}] (median, quartiles; n={options.runs}); "
        f"largest process {result['largest_rss_mb']:.0f} MB; {result['machine']}, Python {result['python']}"
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump(result, stream, indent=2)


if __name__ == "__main__":
    main()
