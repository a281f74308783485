"""Which trigger keywords help and which mislead: each one judged on labelled tasks.

    python -m benchmarks.keywords [FILE.jsonl ...] [--recipe RECIPE.toml] [--json OUT]

Judged are the tasks which a keyword decides by the origin's rule: those whose matched agent of the
highest priority is the keyword's. One that is right in fewer than a quarter of them misleads three
times out of four, and goes. (Three fifths of the authored tasks carry another agent's vocabulary on
purpose, so that the shares are lower than in daily use.) Without files, the recipe's train split is
taken.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from edge.agents import load_agents
from edge.evaluate import Labelled, Proportion, read_labelled
from edge.keywords import KeywordRules
from export.dataset import load_dataset
from export.recipe import load_recipe

_FEWEST = 8  # tasks decided; fewer say nothing of a keyword
_SHARE = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.jsonl", help="labelled tasks besides the split")
    parser.add_argument("--recipe", type=Path, default=Path("models/ruvltra-mini/recipe.toml"))
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    agents = load_agents(recipe.resolve(recipe.agents))
    names = [agent.name for agent in agents]
    rows = [Labelled(e.task, e.agent) for e in load_dataset(recipe, names).train]
    for path in options.files:
        rows += read_labelled(path, names)
    rules = KeywordRules(agents)
    decided: dict[tuple[str, str], list[bool]] = defaultdict(list)
    right = matched = 0
    for row in rows:
        matches = rules.match(row.task)
        matched += bool(matches.first)
        right += len(matches.first) == 1 and names[matches.first[0]] == row.agent
        for position in matches.first:
            for phrase in matches.phrases[position]:
                decided[names[position], phrase].append(names[position] == row.agent)
    table = sorted(
        ((agent, phrase, Proportion.of(sum(hits), len(hits))) for (agent, phrase), hits in decided.items()),
        key=lambda line: line[2].value or 0.0,
    )
    misleading = [line for line in table if line[2].n >= _FEWEST and (line[2].value or 0.0) < _SHARE]
    print(f"{len(rows)} tasks; a keyword matches {matched}, the rules alone are right in {right}")
    for title, lines in (
        (f"right in fewer than {_SHARE:.0%} of {_FEWEST} or more tasks: to be dropped", misleading),
        ("the rest", [line for line in table if line not in misleading]),
    ):
        print(f"\n{title}")
        for agent, phrase, share in lines:
            print(f"  {agent:<20}{phrase:<26}{share}  n = {share.n}")
    if options.json:
        lines = [{"agent": agent, "keyword": phrase, **asdict(share)} for agent, phrase, share in table]
        Path(options.json).write_text(json.dumps({"tasks": len(rows), "keywords": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
