"""The command ``ruvltra-export``: fetch, bundle, verify, inspect, finetune, soft-labels, mine-commits, split."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from edge import __version__
from edge.errors import EdgeError
from export.errors import RecipeError


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
        help="train an encoder and its agents' prototypes",
        description="Train a recipe's checkpoint and keep the best epoch by dev accuracy. With --from, go on from a "
        "checkpoint or bundle, gently; with --extra, train on tasks of your own as well. A run that was killed goes "
        "on where it was when it is started again.",
    )
    finetune.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE.toml", help="may be left out with --from and --extra"
    )
    finetune.add_argument("--out", type=Path, metavar="DIR", help="default: checkpoint/ beside the recipe")
    finetune.add_argument(
        "--commits",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.jsonl",
        help="labelled commit subjects, if the recipe trains on them; once for each of its files",
    )
    finetune.add_argument(
        "--from", type=Path, dest="start", metavar="DIR", help="checkpoint or bundle to go on from, by short settings"
    )
    finetune.add_argument(
        "--extra",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.jsonl",
        help='more tasks {"task", "agent"} to train on, from mine-commits for example; may be repeated',
    )
    finetune.add_argument(
        "--base",
        type=Path,
        metavar="PATH",
        help="the recipe's base, a folder or a GGUF file, if it is not where it says",
    )
    finetune.add_argument("--restart", action="store_true", help="do not resume a run that was killed")
    finetune.add_argument("--quiet", action="store_true", help="no progress bar")
    finetune.set_defaults(run=_finetune)

    soft = verbs.add_parser(
        "soft-labels",
        help="have a larger teacher label a recipe's tasks",
        description="Write a fine-tuned teacher's probabilities for every training task of a recipe, made-up "
        "variations included, for its soft_weight to train on.",
    )
    soft.add_argument("teacher", type=Path, metavar="CHECKPOINT")
    soft.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    soft.add_argument("--commits", type=Path, action="append", default=[], metavar="FILE.jsonl", help="as for finetune")
    soft.add_argument("--quiet", action="store_true", help="no progress bar")
    soft.set_defaults(run=_soft_labels)

    mine = verbs.add_parser(
        "mine-commits",
        help="turn git histories into labelled tasks",
        description="Turn the conventional commits of git checkouts into labelled tasks: feat to coder, fix to "
        "debugger, docs to documenter, refactor to refactorer, test to tester, perf to optimizer, ci to devops.",
    )
    mine.add_argument(
        "repositories", nargs="+", metavar="REPO[@REVISION]", help="folder of a git checkout or bare clone"
    )
    mine.add_argument(
        "--most", type=int, metavar="N", help="keep an agent's N newest tasks of each repository (default: all)"
    )
    mine.add_argument("--out", type=Path, metavar="FILE.jsonl", required=True)
    mine.add_argument("--json", action="store_true", help="write the counts as JSON")
    mine.set_defaults(run=_mine_commits)

    split = verbs.add_parser(
        "split",
        help="write a recipe's train, dev and test parts",
        description="Write a recipe's fixed partition as train.jsonl, dev.jsonl and test.jsonl, to evaluate with.",
    )
    split.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    split.add_argument("--out", type=Path, metavar="DIR", required=True)
    split.set_defaults(run=_split)

    fetch = verbs.add_parser(
        "fetch",
        help="download a file of a model repository",
        description="Download a file of a Hugging Face hub repository and check its digest. A download that broke off "
        "goes on where it stopped. Prints the file's path, and on standard error its size and sha256.",
    )
    fetch.add_argument("source", metavar="OWNER/NAME:FILE")
    fetch.add_argument("--out", type=Path, metavar="DIR", default=Path(), help="folder for it (default: this one)")
    fetch.add_argument("--revision", metavar="R", help="branch, tag or commit (default: the main branch)")
    fetch.add_argument("--sha256", metavar="HEX", help="digest that it must have, besides the one that the hub states")
    fetch.add_argument("--force", action="store_true", help="replace another file of this name")
    fetch.add_argument("--json", action="store_true", help="write path, size, digest and commit as JSON")
    fetch.add_argument("--quiet", action="store_true", help="no progress bar, and nothing but the result")
    fetch.set_defaults(run=_fetch)

    bundle = verbs.add_parser(
        "bundle",
        help="turn a checkpoint into a verified bundle",
        description="Export a checkpoint to ONNX, prove each stage against the one before it, calibrate and write a "
        "bundle. Writes no bundle if a stage misses its bound, but a report beside it.",
    )
    bundle.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="Hugging Face or sentence-transformers folder, GGUF file, or hub id (owner/name)",
    )
    bundle.add_argument(
        "--task",
        default="embed",
        metavar="embed|generate",
        help="generate adds a generating graph to the embedding one (embed)",
    )
    bundle.add_argument(
        "--pooling", metavar="MODE", help="where the checkpoint states none: mean, cls, lasttoken and others"
    )
    bundle.add_argument(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="longest text (default: the checkpoint's; decoders 2048, or 32768 at most where they generate)",
    )
    bundle.add_argument("--out", type=Path, metavar="DIR", required=True)
    bundle.add_argument(
        "--recipe", type=Path, metavar="RECIPE.toml", help="takes name, agents and dev split from a recipe"
    )
    bundle.add_argument(
        "--agents",
        type=Path,
        metavar="PATH",
        help="agents file (default: those of --recipe or --like, or the thirteen)",
    )
    bundle.add_argument("--eval", type=Path, metavar="FILE.jsonl", help="labelled tasks to calibrate confidence on")
    bundle.add_argument(
        "--like",
        type=Path,
        metavar="BUNDLE",
        help="for a checkpoint adapted from this bundle: takes its name, version, licence and agents, and without "
        "--eval its calibration",
    )
    bundle.add_argument(
        "--variants",
        default="fp32,int8",
        help="comma-separated, of fp32, fp16, int8, int8-static, int8-weights, int8-int4-weights, int4-weights, "
        "int4-weights-symmetric, the last of which is the default, and of the CoreML packages coreml-metal and "
        "coreml-ane, in half precision or compressed (coreml-ane-int8; palette8, palette6, palette4); or auto, which "
        "measures all graphs and keeps the best (fp32,int8)",
    )
    bundle.add_argument(
        "--name", help="name in the manifest (default: that of --recipe or --like, or the checkpoint folder's)"
    )
    bundle.add_argument("--licence", help="licence in the manifest (default: that of --recipe or --like, or 'unknown')")
    bundle.add_argument(
        "--minimum-cosine",
        action="append",
        default=[],
        type=_bound,
        metavar="VARIANT=VALUE",
        help="another bound on the cosine to the original, e.g. int8=0.99",
    )
    bundle.add_argument(
        "--maximum-drop",
        type=float,
        default=None,
        metavar="SHARE",
        help="share of the labelled tasks that a variant may lose against fp32, beyond chance (0.005)",
    )
    bundle.add_argument("--force", action="store_true", help="replace an existing folder")
    bundle.add_argument("--quiet", action="store_true", help="no progress bar")
    bundle.set_defaults(run=_bundle)

    verify = verbs.add_parser(
        "verify",
        help="redo all gates on an existing bundle",
        description="Check a bundle's hashes and goldens and hold its variants against its fp32 graph, or its goldens "
        "where there is none; with the checkpoint that it was made of, hold every graph against the network and the "
        "network against the checkpoint's own code. With --eval, hold the routing of each against that of the first.",
    )
    verify.add_argument("bundle", type=Path, metavar="BUNDLE")
    verify.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT")
    verify.add_argument("--eval", type=Path, metavar="FILE.jsonl", help="labelled tasks to measure routing on")
    verify.add_argument("--json", action="store_true", help="write the stages as JSON")
    verify.set_defaults(run=_verify)

    capabilities = verbs.add_parser(
        "capabilities",
        help="make a catalogue of capabilities part of a bundle",
        description='Fit the search of a catalogue, rows {"ids": ["ecosystem/kind/name", ...], "description", '
        '"keywords", "requests"}, and put it into a bundle, for `ruvltra capabilities`.',
    )
    capabilities.add_argument("catalogue", type=Path, metavar="CATALOGUE.jsonl")
    capabilities.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    capabilities.set_defaults(run=_capabilities)

    inspect = verbs.add_parser(
        "inspect",
        help="show what a GGUF file holds",
        description="Show architecture, sizes, tensor types and tokenizer of a GGUF file without loading its weights.",
    )
    inspect.add_argument("file", type=Path, metavar="FILE.gguf")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.add_argument("--json", action="store_true", help="write it as JSON")
    inspect.set_defaults(run=_inspect)
    return parser


def _bound(text: str) -> tuple[str, float]:
    variant, _, value = text.partition("=")
    try:
        return variant, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError("must be VARIANT=VALUE, e.g. int8=0.99") from None


def _require_toolchain() -> None:
    """The tested set of tools, or one message that says what differs."""
    from export.toolchain import check_toolchain

    check_toolchain()


def _finetune(options: argparse.Namespace) -> int:
    _require_toolchain()
    from export.finetune import finetune
    from export.plan import plan_adaptation, plan_recipe
    from export.recipe import load_recipe

    if options.commits and options.recipe is None:
        raise RecipeError("--commits belongs to a recipe. Give your own tasks with --extra.")
    if options.recipe is None and (options.start is None or not options.extra):
        raise RecipeError("give a recipe, or both --from and --extra.")
    if options.out is None and (options.start is not None or options.recipe is None):
        raise RecipeError("--from needs an --out, so that no shipped checkpoint is replaced by an adapted one.")
    if options.recipe is not None:
        recipe = load_recipe(options.recipe)
        if options.base is not None:
            recipe = dataclasses.replace(recipe, base=str(options.base.resolve()))
        plan = plan_recipe(recipe, commits=options.commits, start=options.start, extra=options.extra)
    else:
        plan = plan_adaptation(options.start, options.extra)
    out = options.out or options.recipe.parent / "checkpoint"
    metrics = finetune(plan, out, restart=options.restart, quiet=options.quiet)
    best = metrics["epochs"][metrics["best_epoch"] - 1]
    print(f"{out}: best epoch {metrics['best_epoch']}, dev accuracy {best['dev_accuracy']:.4f}")
    return 0


def _soft_labels(options: argparse.Namespace) -> int:
    _require_toolchain()
    from export.checkpoint import load_checkpoint
    from export.plan import training_texts
    from export.recipe import load_recipe
    from export.soft_labels import write_soft_labels

    recipe = load_recipe(options.recipe)
    if not recipe.data.soft_labels:
        raise RecipeError(f"{recipe.path}: names no file under [data] soft_labels. Add the key.")
    path = recipe.resolve(recipe.data.soft_labels)
    teacher = load_checkpoint(options.teacher)
    texts = training_texts(recipe, options.commits)
    count = write_soft_labels(path, teacher, texts, recipe.train.temperature, options.quiet)
    print(f"{path}: {count} tasks")
    return 0


def _mine_commits(options: argparse.Namespace) -> int:
    from export.commits import mine_commits

    mined = mine_commits(options.repositories, options.most)
    if not mined.rows:
        raise RecipeError("no conventional commits found ('feat: ...', 'fix(parser): ...'). Give other repositories.")
    partial = options.out.with_name(options.out.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mined.rows), encoding="utf-8")
    partial.replace(options.out)
    if options.json:
        print(json.dumps({"file": str(options.out), "tasks": mined.counts, "left_out": mined.left_out}))
        return 0
    print(f"{options.out}: {len(mined.rows)} tasks")
    for title, counts in (("tasks by agent", mined.counts), ("commits left out", mined.left_out)):
        print(f"{title}:")
        for name, count in counts.items():
            print(f"  {count:>7}  {name}")
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


def _fetch(options: argparse.Namespace) -> int:
    from export.fetch import fetch

    try:
        found = fetch(
            options.source,
            options.out,
            revision=options.revision,
            sha256=options.sha256,
            force=options.force,
            quiet=options.quiet,
        )
    except KeyboardInterrupt:
        print("ruvltra-export: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    if not options.quiet:
        before = "" if found.downloaded else ", was there and is not downloaded again"
        print(f"{found.bytes} bytes, sha256 {found.sha256}{before}", file=sys.stderr)
    if options.json:
        document = {"file": str(found.file), "bytes": found.bytes, "sha256": found.sha256}
        print(json.dumps({**document, "repository": found.repository, "revision": found.revision}))
    else:
        print(found.file)
    return 0


def _bundle(options: argparse.Namespace) -> int:
    _require_toolchain()
    from edge.agents import load_agents
    from edge.bundle import Bundle
    from edge.evaluate import Labelled, read_labelled
    from export.bundle import MAXIMUM_DROP, Gates, Identity, build_bundle, check_arguments
    from export.checkpoint import DECODER_LENGTH, load_checkpoint
    from export.dataset import load_dataset
    from export.decoder import LONGEST
    from export.parity import table
    from export.recipe import load_recipe
    from export.search import require_plots

    if options.like and (options.recipe or options.agents):
        raise RecipeError("--like says what --recipe and --agents say. Give either.")
    tasks = {task.strip() for task in options.task.split(",")}
    if not tasks or tasks - {"embed", "generate"}:
        raise RecipeError(f"--task {options.task}: unknown. Use embed, or generate, which embeds as well.")
    variants = [variant.strip() for variant in options.variants.split(",") if variant.strip()]
    if variants == ["auto"]:
        require_plots()
    recipe = load_recipe(options.recipe) if options.recipe else None
    like = Bundle.open(options.like) if options.like else None
    origin = recipe or like
    version = origin.version if origin else "0"
    if like:
        version = version.removesuffix("+adapted") + "+adapted"
    if options.agents:
        agents = load_agents(options.agents)
    elif recipe:
        agents = load_agents(recipe.resolve(recipe.agents))
    else:
        agents = list((like or Bundle.open()).agents)
    names = [agent.name for agent in agents]
    labelled, labelled_name = [], None
    if options.eval:
        labelled, labelled_name = read_labelled(options.eval, names), options.eval.name
    elif recipe:
        labelled = [Labelled(e.task, e.agent) for e in load_dataset(recipe, names).dev]
        labelled_name = f"{recipe.name} dev split"
    name = options.checkpoint.resolve().name.removesuffix(".gguf")
    gates = Gates(dict(options.minimum_cosine), MAXIMUM_DROP if options.maximum_drop is None else options.maximum_drop)
    # Asked before a large checkpoint is loaded, and again with it.
    check_arguments(options.out, variants=variants, labelled=labelled, gates=gates, replace=options.force)
    reports = build_bundle(
        load_checkpoint(
            options.checkpoint,
            pooling=options.pooling,
            max_length=options.max_length,
            longest=LONGEST if "generate" in tasks else DECODER_LENGTH,
            quiet=options.quiet,
        ),
        options.out,
        identity=Identity(
            name=options.name or (origin.name if origin else name),
            version=version,
            licence=options.licence or (origin.licence if origin else "unknown"),
            base_model=origin.base_model if origin else name,
        ),
        agents=agents,
        variants=variants,
        generate="generate" in tasks,
        labelled=labelled,
        labelled_name=labelled_name,
        like=like,
        gates=gates,
        replace=options.force,
        quiet=options.quiet,
    )
    print(table(reports))
    print(f"{options.out}: written and verified{_peak()}")
    return 0


def _peak() -> str:
    """The largest memory of this process so far, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kB elsewhere
    return f"; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GB"


def _verify(options: argparse.Namespace) -> int:
    _require_toolchain()
    from edge.bundle import Bundle
    from edge.evaluate import read_labelled
    from export.parity import table
    from export.verify import verify

    bundle = Bundle.open(options.bundle)
    labelled = read_labelled(options.eval, [agent.name for agent in bundle.agents]) if options.eval else []
    checks, reports = verify(options.bundle, options.checkpoint, labelled, options.json)
    failed = [check for check in checks if not check.ok]
    holds = not failed and not any(report.failures for report in reports)
    if options.json:
        stages = [report.document() for report in reports]
        print(json.dumps({"holds": holds, "checks": [dataclasses.asdict(c) for c in checks], "stages": stages}))
    else:
        for check in checks:
            print(f"{'ok' if check.ok else 'FAILED':<8}{check.name}: {check.detail}")
        if reports:
            print(table(reports))
        print("all gates hold" if holds else "a gate does not hold. Export the bundle again.")
    return 0 if holds else 1


def _capabilities(options: argparse.Namespace) -> int:
    from export.capabilities import add_catalogue

    found = add_catalogue(options.catalogue, options.bundle)
    print(
        f"held-back requests, {found.first.n}: right at the first place {found.first}, within five {found.first_five}"
    )
    print(f"{options.bundle}: written and opened")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    _require_toolchain()
    from export.gguf import GgufFile, summary

    with GgufFile(options.file) as file:
        found = summary(file)
    if options.json:
        print(json.dumps(found))
        return 0
    tensors = found.pop("tensors")
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {part}" for name, part in value.items())
        print(f"{key:<16}{value}")
    if options.tensors:
        for tensor in tensors:
            print(
                f"  {tensor['name']:<32}{tensor['type']:<8}{'x'.join(map(str, tensor['shape'])):<16}{tensor['bytes']}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
