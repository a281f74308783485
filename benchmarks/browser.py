"""The page in headless Chromium, and the module in Node, beside Python: the first decision, and those after it.

    python -m benchmarks.browser [--quick] [--json OUT]

Each round opens the page in a fresh profile, from a server on this machine: fetching, checking and loading all of it
are part of the time. Decisions are those of the same tasks, one after the other; ratios are to Python's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import record, texts
from edge import Bundle, Router
from edge.bundle import default_bundle
from edge.playground import Server, site

WEB = record.ROOT / "tests" / "web"
LIMIT = 3000  # milliseconds that the first decision may take


@contextlib.contextmanager
def served(bundle: Bundle) -> Iterator[str]:
    """The page's address."""
    with Server(site(bundle)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.address
        server.shutdown()


def node(script: str, request: dict[str, Any]) -> Any:
    done = subprocess.run(["node", WEB / script], input=json.dumps(request), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(folder: Path, rounds: int) -> list[record.Row]:
    """Rows of milliseconds."""
    tasks = texts.shuffled(texts.tasks())[:200]
    bundle = Bundle.open(folder)
    first: dict[str, list[float]] = {"Chromium": [], "Node": []}
    routes: dict[str, list[float]] = {"Python": [], "Chromium": [], "Node": []}
    with served(bundle) as address:
        for _ in tqdm(range(rounds), "rounds", leave=False):
            seen = node("page.mjs", {"address": address, "script": "timing", "tasks": tasks})["result"]
            first["Chromium"].append(seen["first"])
            routes["Chromium"].append(statistics.median(seen["routes"]))
            timed = node("time.mjs", {"folder": str(folder), "tasks": tasks})
            first["Node"].append(timed["first"])
            routes["Node"].append(statistics.median(timed["routes"]))
            router = Router.load(folder)
            times = []
            for task in tasks:
                start = time.perf_counter()
                router.route(task)
                times.append(1000 * (time.perf_counter() - start))
            routes["Python"].append(statistics.median(times))
    rows = [
        record.Row("from nothing to the first decision", name, "first", "ms", statistics.median(values),
                   *record.quartiles(values), n=rounds)
        for name, values in first.items()
    ]  # fmt: skip
    return rows + [
        record.timed("a decision, 200 tasks", name, "p50", "ms", values, routes["Python"])
        for name, values in routes.items()
    ]


def main() -> int:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks browser", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--bundle", type=Path, default=default_bundle(), help="default: the one that is built in")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    rows = measure(options.bundle, 2 if options.quick else 9)
    version = subprocess.run(["/usr/bin/chromium", "--version"], capture_output=True, text=True, check=True).stdout
    packages = {
        "chromium": version.split()[1],
        "node": subprocess.check_output(["node", "--version"], text=True).strip(),
    }
    lock = json.loads((record.ROOT / "edge" / "web" / "package-lock.json").read_text("utf-8"))["packages"]
    packages |= {name: lock[f"node_modules/{name}"]["version"] for name in ("onnxruntime-web", "onnxruntime-node")}
    notes = [f"the first decision may take {LIMIT} ms", "ratios are to: Python"]
    record.finish("browser", rows, options, packages, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
