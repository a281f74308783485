"""Accuracy of bundles on labelled files, by strategy and by the set a row belongs to.

    python -m benchmarks.accuracy FILE.jsonl [...] [--bundle DIR] [--bundle DIR ...] [--json OUT]

Rows with a key "set" are scored set by set; "pair:X/Y" is split into its two sides, X and Y. An
abstention counts as wrong; "top-1" takes the first of the ranking all the same.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from edge.bundle import Bundle
from edge.evaluate import Labelled, evaluate, read_labelled
from edge.router import STRATEGIES, Router

_SHOWN = ("embedding", "hybrid", "keyword-first", "keyword")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--bundle", action="append", metavar="DIR", help="default: the built-in bundle")
    parser.add_argument("--variant", metavar="ID")
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    results = []
    for folder in options.bundle or [None]:
        bundle = Bundle.open(folder)
        router = Router.load(bundle, variant=options.variant)
        variant = bundle.variant(options.variant).id
        for path in options.files:
            rows = read_labelled(path, [agent.name for agent in router.agents])
            signals = [router.signals(row.task) for row in rows]
            for name, positions in sets(path, rows).items():
                members, theirs = [rows[i] for i in positions], [signals[i] for i in positions]
                scores = {s.strategy: s for s in evaluate(router, members, STRATEGIES, theirs)}
                print(f"\n{bundle.name} {variant}  {path.name}  {name}  n = {len(members)}")
                for strategy in _SHOWN:
                    score = scores[strategy]
                    rest = f"  top-1 {score.top1}" if score.accuracy.n else f"  abstains {score.abstain_recall}"
                    print(f"  {strategy:<14}{score.accuracy}{rest}")
                    values = {k: v for k, v in asdict(score).items() if k not in ("matrix", "per_agent", "confusions")}
                    results.append({"bundle": bundle.name, "variant": variant, "file": path.name, "set": name} | values)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
