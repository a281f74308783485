"""How long does one text take, warm, beside what a user would pick instead?

    python -m benchmarks.latency [--quick] [--threads N] [--peers A,B] [--gguf FILE] [--json OUT]

All processes are loaded at the same time, each confined to N cores, and asked in turn for texts of exactly 4, 12 and 48
tokens. A round's figure is the median of its calls, one text each; ratios are to ruvltra-mini int8 in the same round.
Peers of the same backbone run our checkpoint, and are refused if their vectors are not ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import record, texts
from benchmarks.peers import PEERS
from benchmarks.peers.start import REFERENCE, Ready, check, parser, prepare, report
from benchmarks.race import Worker, in_turn

LENGTHS = (4, 12, 48)
_MB = 1e6


class Asked:
    """A worker as the subject of one kind of question."""

    def __init__(self, worker: Worker, do: str) -> None:
        self._worker, self._do = worker, do

    def ask(self, **wanted: Any) -> dict[str, Any]:
        return self._worker.ask(do=self._do, **wanted)


def measure(ready: Sequence[Ready], threads: int, quick: bool) -> list[record.Row]:
    """Rows of times, and of the memory of each process afterwards."""
    rounds, count = (3, 2) if quick else (25, 5)
    reference = f"{PEERS[REFERENCE].subject}, encode"
    cores = f"{threads} thread{'s' if threads > 1 else ''}"
    rows = []
    workers: dict[str, Worker] = {}
    try:
        for each in ready:
            workers[each.name] = Worker(each.command(threads))
        subjects = {}
        for each in ready:
            for do in each.peer.asks:
                subjects[f"{each.peer.subject}, {do}"] = Asked(workers[each.name], do)
        for tokens in LENGTHS:
            wanted = {"texts": texts.exactly(tokens, count), "each": True, "passes": 1, "seconds": 0.05}
            found = in_turn(subjects, wanted, rounds, f"{tokens} tokens")
            for subject, seconds in found.items():
                times = [1e3 * value for value in seconds]
                beside = [1e3 * value for value in found[reference]]
                rows.append(record.timed(f"{tokens} tokens, {cores}", subject, "p50", "ms", times, beside))
        for each in ready:
            case, peer = f"memory after it, {cores}", each.peer.subject
            memory = workers[each.name].ask(do="rss")
            rows.append(record.Row(case, peer, "rss", "MB", memory["bytes"] / _MB))
            rows.append(record.Row(case, peer, "peak", "MB", memory["peak"] / _MB))
    finally:
        for worker in workers.values():
            worker.close()
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    options_of = parser(__doc__)
    options_of.add_argument("--threads", type=int, default=1)
    options = options_of.parse_args(arguments)
    ready, notes = prepare(options)
    ready, checked = check(ready, texts.shuffled(texts.tasks())[:24])
    rows = measure(ready, options.threads, options.quick)
    report("latency", rows, [f"ratios are to {PEERS[REFERENCE].subject}, encode", *notes, *checked], ready, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
