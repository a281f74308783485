"""Accuracy of bundles on labelled files, by strategy and by the set a row belongs to.

    python -m benchmarks.accuracy FILE.jsonl [...] [--bundle DIR] [--bundle DIR ...] [--json OUT] [--markdown]

Rows with a key "set" are scored set by set; "pair:X/Y" is split into its two sides, X and Y. An
abstention counts as wrong; "top-1" takes the first of the ranking all the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge.bundle import Bundle
from edge.evaluate import Labelled, Proportion, evaluate, read_labelled
from edge.router import Router

_SHOWN = ("keyword", "keyword-first", "embedding", "hybrid")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--bundle", action="append", metavar="DIR", help="default: the built-in bundle")
    parser.add_argument("--variant", metavar="ID")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--markdown", action="store_true", help="write the figures as two tables, as in the cards")
    options = parser.parse_args()
    if len({path.name for path in options.files}) < len(options.files):
        parser.error("two files have the same name, by which results are told apart")
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
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
