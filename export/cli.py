"""The command ``ruvltra-export``: finetune, split, bundle."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from edge import __version__
from edge.errors import EdgeError, MissingExtra


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 error, 2 usage)."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except EdgeError as error:
        report = getattr(error, "report", "")
        print(f"{report}\n" * bool(report) + f"ruvltra-export: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, for example; what was begun has been removed
        print(f"ruvltra-export: {error}. Free the resource or choose another folder.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ruvltra-export: interrupted; nothing half-done was left", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ruvltra-export", description="Fine-tune encoders and turn checkpoints into verified bundles."
    )
    parser.add_argument("--version", action="version", version=f"ruvltra-edge {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    finetune = verbs.add_parser(
        "finetune",
        help="train a recipe's checkpoint",
        description="Train a recipe's checkpoint against agent prototypes and keep the best epoch by dev accuracy.",
    )
    finetune.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    finetune.add_argument("--out", type=Path, metavar="DIR", help="default: checkpoint/ beside the recipe")
    finetune.add_argument(
        "--commits", type=Path, metavar="FILE.jsonl", help="labelled commit subjects, if the recipe trains on them"
    )
    finetune.add_argument("--quiet", action="store_true", help="no progress bar")
    finetune.set_defaults(run=_finetune)

    split = verbs.add_parser(
        "split",
        help="write a recipe's train, dev and test parts",
        description="Write a recipe's fixed partition as train.jsonl, dev.jsonl and test.jsonl, to evaluate with.",
    )
    split.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    split.add_argument("--out", type=Path, metavar="DIR", required=True)
    split.set_defaults(run=_split)

    bundle = verbs.add_parser(
        "bundle",
        help="turn a checkpoint into a verified bundle",
        description="Export a BERT-family checkpoint to ONNX, prove it against torch, calibrate it and write a bundle. "
        "Writes nothing if a variant misses its bound.",
    )
    bundle.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    bundle.add_argument("--out", type=Path, metavar="DIR", required=True)
    bundle.add_argument(
        "--recipe", type=Path, metavar="RECIPE.toml", help="takes name, agents and dev split from a recipe"
    )
    bundle.add_argument(
        "--agents", type=Path, metavar="PATH", help="agents file (default: the recipe's, or the thirteen)"
    )
    bundle.add_argument("--eval", type=Path, metavar="FILE.jsonl", help="labelled tasks to calibrate confidence on")
    bundle.add_argument("--variants", default="fp32,int8", help="comma-separated; the last is the default (fp32,int8)")
    bundle.add_argument("--name", help="name in the manifest (default: the recipe's, or the checkpoint folder's)")
    bundle.add_argument("--licence", help="licence in the manifest (default: the recipe's, or 'unknown')")
    bundle.add_argument(
        "--minimum-cosine",
        action="append",
        default=[],
        type=_bound,
        metavar="VARIANT=VALUE",
        help="another bound on the cosine to the original, e.g. int8=0.99",
    )
    bundle.add_argument("--force", action="store_true", help="replace an existing folder")
    bundle.add_argument("--quiet", action="store_true", help="no progress bar")
    bundle.set_defaults(run=_bundle)
    return parser


def _bound(text: str) -> tuple[str, float]:
    variant, _, value = text.partition("=")
    try:
        return variant, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError("must be VARIANT=VALUE, e.g. int8=0.99") from None


def _require_torch() -> None:
    """The authoring side's imports, turned into one message if they are not installed."""
    try:
        import onnx
        import onnxscript
        import torch
        import transformers  # noqa: F401
    except ImportError:
        raise MissingExtra("ruvltra-export", "export") from None
    del onnx, onnxscript, torch


def _finetune(options: argparse.Namespace) -> int:
    _require_torch()
    from export.finetune import finetune
    from export.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    out = options.out or recipe.resolve("checkpoint")
    metrics = finetune(recipe, out, commits=options.commits, quiet=options.quiet)
    best = metrics["epochs"][metrics["best_epoch"] - 1]
    print(f"{out}: best epoch {metrics['best_epoch']}, dev accuracy {best['dev_accuracy']:.4f}")
    return 0


def _split(options: argparse.Namespace) -> int:
    from edge.agents import load_agents
    from export.dataset import load_dataset
    from export.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    dataset = load_dataset(recipe, [agent.name for agent in load_agents(recipe.resolve(recipe.agents))])
    options.out.mkdir(parents=True, exist_ok=True)
    for part, examples in (("train", dataset.train), ("dev", dataset.dev), ("test", dataset.test)):
        path = options.out / f"{part}.jsonl"
        lines = [json.dumps({"task": e.task, "agent": e.agent}, ensure_ascii=False) + "\n" for e in examples]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(examples)} tasks")
    print(f"partition sha256 {dataset.digest()}")
    return 0


def _bundle(options: argparse.Namespace) -> int:
    _require_torch()
    from edge.agents import load_agents
    from edge.bundle import Bundle
    from edge.evaluate import Labelled, read_labelled
    from export.bundle import Identity, build_bundle
    from export.dataset import load_dataset
    from export.recipe import load_recipe

    recipe = load_recipe(options.recipe) if options.recipe else None
    if options.agents:
        agents = load_agents(options.agents)
    elif recipe:
        agents = load_agents(recipe.resolve(recipe.agents))
    else:
        agents = list(Bundle.open().agents)
    names = [agent.name for agent in agents]
    labelled, labelled_name = [], None
    if options.eval:
        labelled, labelled_name = read_labelled(options.eval, names), options.eval.name
    elif recipe:
        labelled = [Labelled(e.task, e.agent) for e in load_dataset(recipe, names).dev]
        labelled_name = f"{recipe.name} dev split"
    reports = build_bundle(
        options.checkpoint,
        options.out,
        identity=Identity(
            name=options.name or (recipe.name if recipe else options.checkpoint.resolve().name),
            version=recipe.version if recipe else "0",
            licence=options.licence or (recipe.licence if recipe else "unknown"),
            base_model=recipe.base_model if recipe else options.checkpoint.resolve().name,
        ),
        agents=agents,
        variants=[variant.strip() for variant in options.variants.split(",") if variant.strip()],
        labelled=labelled,
        labelled_name=labelled_name,
        minimum_cosine=dict(options.minimum_cosine),
        replace=options.force,
        quiet=options.quiet,
    )
    for report in reports:
        print(report.table())
    print(f"{options.out}: written and verified")
    return 0


if __name__ == "__main__":
    sys.exit(main())
