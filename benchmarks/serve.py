"""The HTTP server under load: with batches, without, and beside the usual way of a thread for each request.

    python -m benchmarks.serve [--quick] [--seconds S] [--json OUT]

wrk holds 32 connections to a server on loopback and asks for one task after the other over each. The load itself takes
one of the two cores for about a tenth of the time. First the long run with batches, for errors, the 99th percentile and
memory; then the three ways in turn, round by round. Ratios are to one text after the other (`--max-batch 1`).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import record, texts

CONNECTIONS = 32
WAYS = ("batches", "one text after the other", "a thread for each request")
SCRIPT = """
local bodies = {}
for line in io.lines("%s") do bodies[#bodies + 1] = line end
local place = 0
request = function()
  place = place %% #bodies + 1
  return wrk.format("POST", "%s", {["Content-Type"] = "application/json"}, bodies[place])
end
"""


def pool(port: int) -> None:
    """The usual way: Starlette hands each request to its thread pool."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    from edge import Router

    router = Router.load()
    assert router.encoder is not None
    encoder = router.encoder

    async def route(request: Request) -> Response:
        decision = await run_in_threadpool(router.route, (await request.json())["input"])
        return JSONResponse({"object": "list", "data": [{"index": 0} | decision.document(3)], "model": "ruvltra-mini"})

    async def embed(request: Request) -> Response:
        vector = (await run_in_threadpool(encoder.encode, [(await request.json())["input"]]))[0]
        return JSONResponse({"object": "list", "data": [{"index": 0, "embedding": base64.b64encode(vector).decode()}]})

    routes = [Route("/v1/route", route, methods=["POST"]), Route("/v1/embeddings", embed, methods=["POST"])]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="error", access_log=False, http="httptools", ws="none")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def server(way: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server's port and process."""
    port = free_port()
    command = [sys.executable, "-m", "edge.cli", "serve", "--port", str(port), "--no-log"]
    if way == WAYS[1]:
        command += ["--max-batch", "1"]
    if way == WAYS[2]:
        command = [sys.executable, "-m", "benchmarks.serve", "--pool", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=record.ROOT)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


def load(port: int, path: str, seconds: float, folder: Path) -> dict[str, float]:
    """Requests a second, the median and the 99th percentile in milliseconds, and errors."""
    bodies = folder / f"{path.replace('/', '-')}.jsonl"
    more = {"model": "ruvltra-mini", "encoding_format": "base64"} if path.endswith("embeddings") else {}
    tasks = texts.shuffled(texts.tasks())[:2000]
    bodies.write_text("".join(json.dumps({"input": task} | more) + "\n" for task in tasks), "utf-8")
    script = bodies.with_suffix(".lua")
    script.write_text(SCRIPT % (bodies, path), "utf-8")
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "--latency", "--timeout", "30s", "-s", str(script)]
    said = subprocess.run([*command, f"http://127.0.0.1:{port}"], capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = {"errors": 0.0}
    for name, pattern in (
        ("rate", r"Requests/sec:\s+([\d.]+)"),
        ("p50", r"50%\s+([\d.]+\w+)"),
        ("p99", r"99%\s+([\d.]+\w+)"),
    ):
        match = re.search(pattern, said)
        if match is None:
            raise SystemExit(f"wrk said nothing of {name}: {said}")
        number = re.match(r"[\d.]+", match[1])
        assert number is not None
        unit = match[1][number.end() :]
        found[name] = float(number[0]) * {"": 1, "us": 0.001, "ms": 1, "s": 1000, "m": 60000}[unit]
    for match in re.finditer(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said):
        found["errors"] += sum(int(count) for count in match.groups())
    for match in re.finditer(r"Non-2xx or 3xx responses: (\d+)", said):
        found["errors"] += int(match[1])
    return found


def resident(process: subprocess.Popen[bytes]) -> float:
    found = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text("ascii"))
    return int(found[1]) / 1000 if found else 0.0


def measure(seconds: float, rounds: int) -> list[record.Row]:
    """Rows of requests a second, milliseconds, errors and megabytes."""
    rows = []
    long = f"{seconds:g} s, {CONNECTIONS} connections"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for path in ("/v1/route", "/v1/embeddings"):
            with server(WAYS[0]) as (port, process):
                load(port, path, 3, folder)
                before = resident(process)
                found = load(port, path, seconds, folder)
                values: dict[str, tuple[float, str, str]] = {
                    "rate": (found["rate"], "requests/s", "higher"),
                    "p50": (found["p50"], "ms", "lower"),
                    "p99": (found["p99"], "ms", "lower"),
                    "errors": (found["errors"], "requests", "lower"),
                    "growth": (resident(process) - before, "MB", "lower"),
                }
                for measure_of, (value, unit, better) in values.items():
                    rows.append(record.Row(long, f"{path}, {WAYS[0]}", measure_of, unit, value, better=better))
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            tails: dict[str, list[float]] = {way: [] for way in WAYS}
            with contextlib.ExitStack() as stack:
                ports = {way: stack.enter_context(server(way))[0] for way in WAYS}
                for number in tqdm(range(rounds), path, leave=False):
                    for way in [*WAYS[number % 3 :], *WAYS[: number % 3]]:
                        once = load(ports[way], path, seconds / 10, folder)
                        rates[way].append(once["rate"])
                        tails[way].append(once["p99"])
            for way in WAYS:
                subject = f"{path}, {way}"
                rows.append(record.timed("in turn", subject, "rate", "requests/s", rates[way], rates[WAYS[1]]))
                rows.append(record.timed("in turn", subject, "p99", "ms", tails[way], tails[WAYS[1]]))
    return rows


def main() -> int:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serve", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 seconds instead of 60, three rounds")
    parser.add_argument("--seconds", type=float, default=60, help="of the long run (default: 60)")
    parser.add_argument("--pool", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    if options.pool:
        pool(options.pool)
        return 0
    if shutil.which("wrk") is None:
        parser.error("needs wrk, of Debian's package of that name")
    os.environ.pop("RUVLTRA_TOKEN", None)
    rows = measure(10 if options.quick else options.seconds, 3 if options.quick else 7)
    packages = record.versions(("starlette", "uvicorn", "httptools", "uvloop"))
    notes: list[Any] = [f"ratios are to: {WAYS[1]}"]
    record.finish("serve", rows, options, packages, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
