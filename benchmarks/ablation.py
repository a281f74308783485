"""What each part of the training is worth: one short run a row, each on top of the rows kept so far.

    python -m benchmarks.ablation --commits FILE.jsonl [...] [--epochs N] [--eval FILE.jsonl ...] [--json OUT]

All runs have the recipe's data, seed and number of epochs. Accuracy is that of the nearest prototype
in fp32, without abstaining; a row marked "-" is not part of the rows below it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from edge.evaluate import Labelled, Proportion, calibration_error, read_labelled
from edge.keywords import KeywordRules
from edge.router import Signals, probabilities
from export.calibrate import UNCALIBRATED, calibrate
from export.checkpoint import Checkpoint, Head, load_checkpoint
from export.finetune import Plan, finetune
from export.heads import scores
from export.plan import plan_recipe
from export.recipe import Recipe, load_recipe
from export.wrapper import embed


@dataclass(frozen=True)
class Step:
    """A row: what it changes in the recipe's settings, and whether later rows build on it."""

    name: str
    changes: dict[str, object]
    kept: bool = True
    commits: bool = False


OFF = {
    "infonce_weight": 0.0, "triplet_weight": 0.0, "soft_weight": 0.0, "reward_weight": 0.0, "average": 0.0,
    "hard_negatives": False, "in_batch_negatives": False, "retention_weight": 0.0, "heads": (), "layer_decay": 1.0,
}  # fmt: skip


def steps(recipe: Recipe) -> list[Step]:
    """The rows; weights are the recipe's where it uses the part, else usual ones."""
    train = recipe.train
    rows = [
        Step("+ triplet", {"triplet_weight": 1.0}),
        Step("+ InfoNCE", {"infonce_weight": 1.0, "triplet_weight": 0.5}),
        Step("+ retention", {"retention_weight": 50.0, "label_share": train.label_share}),
        Step("+ in-batch negatives", {"in_batch_negatives": True}, train.in_batch_negatives),
        Step("+ mined hard negatives", {"in_batch_negatives": True, "hard_negatives": True}, train.hard_negatives),
        Step("+ reward weighting", {"reward_weight": train.reward_weight or 0.5}, train.reward_weight > 0),
        Step("+ layer-wise rates", {"layer_decay": 0.85}, train.layer_decay < 1),
        Step("+ averaged weights", {"average": train.average or 0.98}, train.average > 0),
        Step("+ commit subjects", {}, commits=True),
        Step(
            "+ soft labels",
            {
                "soft_weight": train.soft_weight,
                "infonce_weight": train.infonce_weight,
                "triplet_weight": train.triplet_weight,
                "retention_weight": train.retention_weight,
            },
            commits=True,
        ),
    ]
    return [row for row in rows if recipe.data.preferences or "reward_weight" not in row.changes]


def vectors_of(checkpoint: Checkpoint, tasks: Sequence[str]) -> torch.Tensor:
    """(n, dim) fp32 vectors."""
    return embed(checkpoint.encoder(), checkpoint.tokenize(list(tasks)))


def accuracy(checkpoint: Checkpoint, head: Head, rows: Sequence[Labelled]) -> Proportion:
    inside = [row for row in rows if row.agent in head.agents]
    best = scores(head, vectors_of(checkpoint, [row.task for row in inside])).argmax(1).tolist()
    return Proportion.of(sum(head.agents[b] == row.agent for b, row in zip(best, inside, strict=True)), len(inside))


def untrained(plan: Plan) -> Head:
    """Mean vectors of the training tasks."""
    vectors = vectors_of(plan.start, [e.task for e in plan.dataset.train])
    agents = [e.agent for e in plan.dataset.train]
    means = torch.stack([vectors[torch.tensor([a == name for a in agents])].mean(0) for name in [*plan.names, "none"]])
    unit = torch.nn.functional.normalize(means, dim=1)
    return Head(tuple(plan.names), unit[:-1, None], unit[-1])


def errors(plan: Plan, checkpoint: Checkpoint, head: Head) -> tuple[float, float]:
    """ECE on the test split before and after calibration on the dev split, embedding strategy."""
    rules = KeywordRules(plan.agents)

    def signals(rows: Sequence[Labelled]) -> list[Signals]:
        vectors = vectors_of(checkpoint, [row.task for row in rows])
        said = scores(head, vectors).numpy()
        outside = (vectors @ head.out_of_scope).numpy()
        return [
            Signals(rules.match(row.task), s.astype(np.float32), s.astype(np.float32), float(o), False, False)
            for row, s, o in zip(rows, said, outside, strict=True)
        ]

    dev, test = ([Labelled(e.task, e.agent) for e in part] for part in (plan.dataset.dev, plan.dataset.test))
    measured = signals(test)
    fitted = calibrate(signals(dev), dev, plan.names)["embedding"]
    result = []
    for calibration in (UNCALIBRATED["embedding"]._replace(out_of_scope=0.0), fitted):
        p = [probabilities(signal, calibration) for signal in measured]
        result.append(
            calibration_error(
                [(float(x.max()), plan.names[int(x.argmax())] == row.agent) for x, row in zip(p, test, strict=True)]
            )
        )
    return result[0], result[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("models/ruvltra-mini/recipe.toml"))
    parser.add_argument("--commits", type=Path, action="append", required=True, metavar="FILE.jsonl")
    parser.add_argument("--eval", type=Path, action="append", default=[], metavar="FILE.jsonl")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", help="run only the rows whose name contains this")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    settings = replace(recipe.train, **OFF, epochs=options.epochs)
    none = replace(recipe.commits, weight=0.0)
    results: list[dict[str, object]] = []

    def report(name: str, plan: Plan, checkpoint: Checkpoint, head: Head, mrr: float | None, seconds: float) -> None:
        files = {path.stem: read_labelled(path, plan.names) for path in options.eval}
        dev = [Labelled(e.task, e.agent) for e in plan.dataset.dev]
        shares = {key: accuracy(checkpoint, head, rows) for key, rows in {"dev": dev, **files}.items()}
        figures = "  ".join(f"{key} {share}" for key, share in shares.items())
        kept = "" if mrr is None else f"  retrieval {mrr:.3f}"
        print(f"{name:<28}{figures}{kept}  {seconds:.0f} s", flush=True)
        values = {key: asdict(share) for key, share in shares.items()}
        results.append({"row": name, "accuracy": values, "retrieval_mrr": mrr, "seconds": seconds})
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")

    if options.only is None:
        plan = plan_recipe(replace(recipe, train=settings, commits=none))
        report("base, means of tasks", plan, plan.start, untrained(plan), None, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(recipe):
            tried = replace(settings, **step.changes)
            if step.kept:
                settings = tried
            if options.only is not None and options.only not in step.name:
                continue
            plan = plan_recipe(
                replace(recipe, train=tried, commits=recipe.commits if step.commits else none),
                commits=options.commits if step.commits else [],
            )
            out = Path(folder, "run")
            metrics = finetune(plan, out, quiet=True)
            best = metrics["epochs"][metrics["best_epoch"] - 1]
            checkpoint = load_checkpoint(out)
            assert checkpoint.head is not None
            seconds = sum(epoch["seconds"] for epoch in metrics["epochs"])
            name = step.name if step.kept else f"- {step.name.removeprefix('+ ')}"
            report(name, plan, checkpoint, checkpoint.head, best["retrieval_mrr"], seconds)
        before, after = errors(plan, checkpoint, checkpoint.head)
        print(f"+ calibration               test ECE {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
