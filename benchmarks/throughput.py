"""How many texts a second, of mixed lengths, beside what a user would pick instead?

    python -m benchmarks.throughput [--quick] [--threads 1,2] [--peers A,B] [--json OUT]

10,000 texts in blocks; all processes are loaded at the same time, each confined to N cores, and get each block in
turn. A peer that takes a batch size gets the best of 1, 4, 16, 32, 64 and 256, by texts that do not count. Ratios are
to ruvltra-mini int8 by the same block.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks import record, texts
from benchmarks.peers import PEERS
from benchmarks.peers.start import REFERENCE, Ready, check, parser, prepare, report
from benchmarks.race import Worker

BATCHES = (1, 4, 16, 32, 64, 256)  # from 1: padding a batch of mixed lengths can cost more than it gains
TRIAL = 128  # texts
_LEFT_OUT = "llama-causal"  # hours; latency asks it
_NO_BATCHES = ("ours", "ruvllm.js")


def measure(
    ready: Sequence[Ready], blocks: Sequence[list[str]], trial: list[str], threads: int
) -> tuple[list[record.Row], str]:
    """Rows of rates and memory, and in words which batch size each had."""
    case = f"{threads} thread{'s' if threads > 1 else ''}"
    rates: dict[str, list[float]] = {each.name: [] for each in ready}
    workers: dict[str, Worker] = {}
    try:
        for each in ready:
            workers[each.name] = Worker(each.command(threads, "throughput"))
        batches = {each.name: _best(each, workers[each.name], trial) for each in tqdm(ready, "batches", leave=False)}
        names = list(workers)
        for number, block in enumerate(tqdm(blocks, f"blocks, {case}", leave=False)):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                rates[name].append(len(block) / _seconds(workers[name], block, batches[name]))
        memory = {name: worker.ask(do="rss")["peak"] / 1e6 for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    rows = [
        record.timed(case, each.peer.subject, "rate", "texts/s", rates[each.name], rates[REFERENCE]) for each in ready
    ]
    rows += [record.Row(case, each.peer.subject, "peak", "MB", memory[each.name]) for each in ready]
    chosen = [f"{each.peer.subject} {batches[each.name]}" for each in ready if each.peer.loader not in _NO_BATCHES]
    return rows, f"batch sizes, {case}: {', '.join(chosen)}"


def _best(each: Ready, worker: Worker, trial: list[str]) -> int:
    sizes = BATCHES[:1] if each.peer.loader in _NO_BATCHES else BATCHES
    worker.ask(do="encode", texts=trial[:16], passes=1)
    return min(sizes, key=lambda size: _seconds(worker, trial, size))


def _seconds(worker: Worker, block: list[str], batch: int) -> float:
    found: list[float] = worker.ask(do="encode", texts=block, batch=batch, passes=1)["seconds"]
    return found[0]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    options_of = parser(__doc__)
    options_of.add_argument("--threads", default="1,2", metavar="N,N")
    options = options_of.parse_args(arguments)
    ready, notes = prepare(options)
    if any(each.name == _LEFT_OUT for each in ready):
        notes.append(f"{PEERS[_LEFT_OUT].subject}: left out, it would take hours; the question of latency has it")
    ready = [each for each in ready if "encode" in each.peer.asks and each.name != _LEFT_OUT]
    ready, checked = check(ready, texts.shuffled(texts.tasks())[:24])
    count, size = (256, 64) if options.quick else (10_000, 500)
    found = texts.mixed(count + TRIAL)
    trial, timed = found[:TRIAL], found[TRIAL:]
    blocks = [timed[start : start + size] for start in range(0, len(timed), size)]
    rows = []
    for threads in map(int, options.threads.split(",")):
        some, batches = measure(ready, blocks, trial, threads)
        rows += some
        notes.append(batches)
    stated = [
        f"ratios are to {PEERS[REFERENCE].subject}",
        f"{len(timed)} texts in blocks of {size}; {texts.lengths(timed)}",
    ]
    report("throughput", rows, [*stated, *notes, *checked], ready, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
