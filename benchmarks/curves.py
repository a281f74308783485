"""What a decision costs as its task, its agents, its threads and its batch grow.

    python -m benchmarks.curves [--rounds N] [--quick] [--json OUT] [--plot FILE.png]

Every curve's settings run in turn within a round, in one process; a figure is the median over rounds of a round's
median, and a ratio is to the curve's smallest setting in the same round. A task is words of the test split that are one
token each, which are counted without the two tokens that every text gets; what exceeds the encoder's longest text is
cut. Agents are the built-in 13, then the catalogue of capabilities, then tasks of models/ruvltra-mini/data as
descriptions, with their two longest words as keywords; all are taken as a user's own, without training.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.record import ROOT, Row, document, save, show, timed
from edge import Bundle, Encoder, Router
from edge.agents import Agent
from edge.device import detect
from edge.encoder import load_tokenizer

BUNDLES = {f"{name} int8": ROOT / "models" / f"ruvltra-{name}" / "bundle" for name in ("mini", "nano")}
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
AGENTS = (13, 100, 1_000, 10_000)
THREADS = (1, 2)
BATCHES = (1, 4, 16, 64, 256)
SHORT, LONG = 12, 96  # tokens: of a usual task; of one that is worth sharing among threads
_LOADS = 3  # rounds of loading, at most
_SECONDS = 0.05  # of one setting in a round


@dataclass(frozen=True)
class Setting:
    """A point of a curve.

    Attributes:
        x: Where on the curve.
        subject: Of which line.
        measure: What is measured.
        unit: ``ms``, ``s`` or ``texts/s``.
        once: What is timed.
        texts: How many texts that does.
    """

    x: int
    subject: str
    measure: str
    unit: str
    once: Callable[[], object]
    texts: int = 1

    def figure(self) -> float:
        """Of one round: of as many runs as fit into the time, and one at least."""
        if self.unit != "s":
            self.once()  # what ran before it had the caches
        times: list[float] = []
        end = time.perf_counter() + _SECONDS
        while not times or time.perf_counter() < end:
            started = time.perf_counter()
            self.once()
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times)
        return {"ms": 1e3 * seconds, "s": seconds, "texts/s": self.texts / seconds}[self.unit]


def measure(curve: str, settings: list[Setting], rounds: int) -> list[Row]:
    """Run the settings in turn, each round from another one on; each with its ratio to the first of its line."""
    found: list[list[float]] = [[] for _ in settings]
    for number in tqdm(range(rounds), desc=f"{curve}, {settings[0].measure}", leave=False):
        for step in range(len(settings)):
            place = (step + number) % len(settings)
            found[place].append(settings[place].figure())
    smallest: dict[str, list[float]] = {}
    rows = []
    for setting, values in zip(settings, found, strict=True):
        beside = smallest.setdefault(setting.subject, values)
        case = f"{curve}: {setting.x}"
        rows.append(timed(case, setting.subject, setting.measure, setting.unit, values, beside))
    return rows


def words() -> list[str]:
    """Words of the test split that are one token for every bundle, in their order."""
    tokenizers = [load_tokenizer(Bundle.open(path)) for path in BUNDLES.values()]
    lines = (ROOT / "models/ruvltra-mini/splits/test.jsonl").read_text(encoding="utf-8").splitlines()
    found: list[str] = []
    for word in (word for line in lines for word in re.findall(r"[a-z]+", json.loads(line)["task"])):
        if all(len(tokenizer.encode(word, add_special_tokens=False).ids) == 1 for tokenizer in tokenizers):
            found.append(word)
        if len(found) == LENGTHS[-1] + BATCHES[-1]:
            break
    return found


def agents(count: int) -> list[Agent]:
    """The first of the agents that the head of this file describes."""
    found = {agent.name: agent for agent in Bundle.open(BUNDLES["mini int8"]).agents}
    for line in (ROOT / "models/capabilities/catalogue.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        found[entry["ids"][0]] = Agent(entry["ids"][0], entry["description"], tuple(entry["keywords"]))
    for path in sorted((ROOT / "models/ruvltra-mini/data").glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            task = json.loads(line).get("task", "").strip()
            if task and len(found) < count:
                keywords = sorted(set(re.findall(r"[a-z]{3,}", task.lower())), key=len)[-2:]
                name = f"{path.stem}-{number}"
                found[name] = Agent(name, task, tuple(keywords))
    return list(found.values())[:count]


def by_tokens(vocabulary: list[str], rounds: int, lengths: tuple[int, ...]) -> list[Row]:
    routers = {name: Router.load(path, device="cpu") for name, path in BUNDLES.items()}
    settings = []
    for length in lengths:
        task = " ".join(vocabulary[:length])
        for name, router in routers.items():
            settings.append(Setting(length, f"{name}, route", "p50", "ms", partial(router.route, task)))
            encode = encoder_of(router).encode
            settings.append(Setting(length, f"{name}, encode", "p50", "ms", partial(encode, [task])))
    return measure("tokens", settings, rounds)


def by_agents(vocabulary: list[str], rounds: int, counts: tuple[int, ...]) -> list[Row]:
    """Of one route, and of loading a router, embedding of the descriptions included."""
    task = " ".join(vocabulary[:SHORT])
    every = agents(counts[-1])
    routes, loads = [], []
    for count in counts:
        for name, path in BUNDLES.items():
            load = partial(Router.load, path, agents=every[:count], device="cpu")
            loads.append(Setting(count, f"{name}, load", "load", "s", load))
            routes.append(Setting(count, f"{name}, route", "p50", "ms", partial(load().route, task)))
    return [*measure("agents", routes, rounds), *measure("agents", loads, min(rounds, _LOADS))]


def by_threads(vocabulary: list[str], rounds: int) -> list[Row]:
    settings = []
    for threads in THREADS:
        for name, path in BUNDLES.items():
            route = Router.load(path, device="cpu", threads=threads).route
            for length in (SHORT, LONG):
                task = " ".join(vocabulary[:length])
                subject = f"{name}, route of {length} tokens"
                settings.append(Setting(threads, subject, "p50", "ms", partial(route, task)))
    return measure("threads", settings, rounds)


def by_batch(vocabulary: list[str], rounds: int, sizes: tuple[int, ...]) -> list[Row]:
    """Texts a second, of different texts of the same length."""
    routers = {name: Router.load(path, device="cpu") for name, path in BUNDLES.items()}
    settings = []
    for size in sizes:
        tasks = [" ".join(vocabulary[start : start + SHORT]) for start in range(size)]
        for name, router in routers.items():
            for what, run in (("encode", encoder_of(router).encode), ("route_many", router.route_many)):
                settings.append(Setting(size, f"{name}, {what}", "rate", "texts/s", partial(run, tasks), size))
    return measure("batch", settings, rounds)


def encoder_of(router: Router) -> Encoder:
    assert router.encoder is not None
    return router.encoder


def plot(rows: list[Row], longest: Mapping[str, int], path: Path) -> None:
    """Small multiples, one question each; bands are quartiles."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    figure = Figure(figsize=(12, 7), layout="constrained", facecolor="white")
    panels = (
        ("tokens", "p50", "route", "tokens of the task, without special ones", "one route, ms (p50)"),
        ("tokens", "p50", "encode", "tokens of the text, without special ones", "one encode, ms (p50)"),
        ("threads", "p50", "route", "threads", f"one route of {SHORT} or {LONG} tokens, ms (p50)"),
        ("agents", "p50", "route", "agents of a user's own", f"one route of {SHORT} tokens, ms (p50)"),
        ("agents", "load", "load", "agents of a user's own", "loading the router, s"),
        ("batch", "rate", "", "texts in a call", f"texts of {SHORT} tokens a second"),
    )
    colours = dict(zip(longest, ("tab:blue", "tab:orange"), strict=True))
    for axis, (curve, kind, what, xlabel, ylabel) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if row.case.startswith(f"{curve}:") and row.measure == kind and what in row.subject:
                lines.setdefault(row.subject, []).append(row)
        for subject, points in lines.items():
            at = [int(row.case.rpartition(": ")[2]) for row in points]
            name, _, told = subject.partition(", ")
            dashed = "--" if told in ("route_many", f"route of {LONG} tokens") else "-"
            label = subject if curve in ("threads", "batch") else name
            axis.plot(at, [row.value for row in points], marker="o", ls=dashed, color=colours[name], label=label)
            low, high = ([getattr(row, end) for row in points] for end in ("low", "high"))
            axis.fill_between(at, low, high, color=colours[name], alpha=0.15, linewidth=0)
        if curve == "tokens":
            for name, tokens in longest.items():
                axis.axvline(tokens - 2, color=colours[name], ls=":", label=f"{name} cuts from here on")
        ticks = sorted({int(row.case.rpartition(": ")[2]) for points in lines.values() for row in points})
        axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
        axis.xaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        values = [row.value for points in lines.values() for row in points]
        wide = max(values) > 8 * min(values)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 7)))
        axis.yaxis.set(minor_locator=NullLocator(), minor_formatter=NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, framealpha=0.6)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="3 rounds, fewer settings")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args(arguments)
    rounds = 3 if options.quick else options.rounds
    step = 3 if options.quick else 1
    vocabulary = words()
    rows = by_tokens(vocabulary, rounds, LENGTHS[::step])
    rows += by_agents(vocabulary, rounds, AGENTS[:2] if options.quick else AGENTS)
    if detect().threads >= max(THREADS):
        rows += by_threads(vocabulary, rounds)
    rows += by_batch(vocabulary, rounds, BATCHES[::step])
    longest = {name: Bundle.open(path).encoder.max_length for name, path in BUNDLES.items()}
    notes = {
        "reference": "the smallest setting of the same curve and subject, in the same round",
        "rounds": rounds,
        "cut at, in tokens with the two that every text gets": longest,
        "tokens of a task where nothing else is said": SHORT,
    }
    question = "cost as tasks, agents, threads and batches grow"
    result = document(question, rows, quick=options.quick, packages={}, notes=notes)
    print(show(result))
    cuts = ", ".join(f"{name} at {tokens}" for name, tokens in longest.items())
    print(f"\nA text is cut, the two tokens that every text gets included: {cuts}.")
    if options.json:
        save(options.json, result)
    if options.plot:
        plot(rows, longest, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
