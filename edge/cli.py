"""The command ``ruvltra``; verbs with verbs of their own, and servers, are in modules of their own."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import onnxruntime

from edge import __version__
from edge.bundle import Bundle, Variant
from edge.choice import LIMIT, USES
from edge.cli_options import count, texts, wanted
from edge.encoder import Encoder
from edge.errors import EdgeError, EdgeWarning, InputError
from edge.files import replaced
from edge.router import STRATEGIES, Decision, Router
from edge.session import MAX_THREADS

if TYPE_CHECKING:
    from edge.evaluate import Score
    from edge.providers import Candidate

T = TypeVar("T")
_Fill = Callable[[argparse.ArgumentParser], None]
_BLOCK = 256  # texts between two steps of a counter
ABSTAINED = 3  # exit status of `ruvltra route` for a single text that nobody takes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 error, 2 usage, 3 abstained)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser(words[0] if words else None).parse_args(words)
    except SystemExit:
        if words[:2] != ["hook", "user-prompt-submit"]:
            raise
        return 0  # Claude Code withholds a prompt from the model where its hook ends with 2, the status of wrong usage
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", EdgeWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            return int(options.run(options))
    except EdgeError as error:
        print(f"ruvltra: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader has gone (as `head` does); leave quietly, and keep the interpreter from
        # flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk behind standard output, for example
        print(f"ruvltra: {error}. Free the resource or direct the output elsewhere.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"ruvltra: {message}", file=sys.stderr)


def run() -> NoReturn:
    """Entry point of the command: :func:`main`, then leave at once.

    Taking the interpreter and the session down in order takes as long as routing several tasks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where the caller has closed it
            stream.reconfigure(errors="backslashreplace")
    status = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            status = 1
    os._exit(status)


def _parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The command line; of one verb alone if it is for that, which takes a fraction of the time."""
    parser = argparse.ArgumentParser(
        prog="ruvltra",
        description="Route developer tasks to agents and embed text, locally and offline.",
        epilog="Exit status: 0 done, 1 error, 2 usage, 3 a single task that the router abstains from.",
    )
    parser.add_argument("--version", action="version", version=f"ruvltra-edge {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    known = {name for name, *_ in _VERBS}
    for name, shared, fill, what, description in _VERBS:
        if verb == name or verb not in known:
            inner = verbs.add_parser(name, help=what, description=description)
            for share in shared:
                share(inner)
            if isinstance(fill, str):  # in a module of its own, with what that imports
                module, _, function = fill.partition(".")
                fill = getattr(importlib.import_module(f"edge.{module}"), function)
            fill(inner)
    return parser


def _share_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="DIR", help="bundle folder or zip file (default: the one that is built in)")
    parser.add_argument("--variant", metavar="ID", help="variant of the bundle to run (default: what suits the device)")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, coreml, openvino ... (default: auto, what `ruvltra tune` measured as best, or cpu)",
    )
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the device's provider, in place of the known ones; may be repeated",
    )
    parser.add_argument("--strict", action="store_true", help="refuse unless the whole model runs on that device")
    parser.add_argument(
        "--use", choices=USES, default="latency", help="what a measured winner is to be best at (default: latency)"
    )
    parser.add_argument(
        "--threads",
        type=_threads,
        metavar="N",
        help="threads for one text (default: 1; texts run side by side)",
    )


def _share_agents(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--agents", metavar="PATH", help="your own agents: a .toml, .json or .md file, or a folder of .md files"
    )


def _share_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write JSON")


def _fill_route(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strategy", choices=STRATEGIES, default="hybrid", help="how to decide (default: hybrid)")
    parser.add_argument(
        "text", nargs="+", metavar="TEXT", help="a task; '-' reads tasks from standard input, one a line"
    )
    parser.set_defaults(run=_route)


def _fill_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE.npy", help="write a float32 array (texts, dim) instead")
    parser.add_argument(
        "text", nargs="+", metavar="TEXT", help="a text; '-' reads texts from standard input, one a line"
    )
    parser.set_defaults(run=_embed)


def _fill_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="DIR", required=True, help="bundle folder or zip file, of a language model")
    parser.add_argument("--generator", metavar="ID", help="which of the bundle's (default: the last one)")
    parser.add_argument("--max-tokens", type=count, default=64, metavar="N", help="at most (default: 64)")
    parser.add_argument("--threads", type=_threads, metavar="N", help="default: one a physical core")
    parser.add_argument("text", metavar="TEXT", help="what is continued")
    parser.set_defaults(run=_generate)


def _fill_capabilities(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-k", type=count, default=5, metavar="N", help="how many (default: 5)")
    parser.add_argument("--ecosystem", metavar="NAME", help="only what this one has (default: all)")
    parser.add_argument(
        "text", nargs="+", metavar="TEXT", help="a request; '-' reads requests from standard input, one a line"
    )
    parser.set_defaults(run=_capabilities)


def _fill_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--strategy", choices=[*STRATEGIES, "all"], default="all", help="what to measure (default: all)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the confusion matrix (hybrid's, if all)")
    parser.set_defaults(run=_eval)


def _fill_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: the built-in bundle")
    parser.set_defaults(run=_inspect)


def _fill_device(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_device)


def _fill_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: the built-in bundle")
    parser.add_argument(
        "--seconds", type=_seconds, default=1.0, metavar="S", help="to time each length and batch (default: 1)"
    )
    parser.add_argument(
        "--limit", type=_seconds, default=LIMIT, metavar="S", help=f"to stop a candidate after (default: {LIMIT:g})"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latency against memory")
    parser.set_defaults(run=_tune)


def _fill_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: the built-in bundle")
    parser.set_defaults(run=_doctor)


# Name, arguments that it shares with others, what gives it its own (a function, or the name of one in a module), help,
# description.
_VERBS: tuple[tuple[str, tuple[_Fill, ...], _Fill | str, str, str | None], ...] = (
    (
        "route",
        (_share_bundle, _share_agents, _share_json),
        _fill_route,
        "say which agent takes a task",
        "Say which agent takes a task, how sure that is, and why.",
    ),
    (
        "embed",
        (_share_bundle, _share_json),
        _fill_embed,
        "turn texts into unit vectors",
        'Turn texts into unit vectors: one JSON object {"text", "vector"} a line, or an array in a file.',
    ),
    (
        "generate",
        (),
        _fill_generate,
        "continue a text",
        "Continue a text by a bundle's language model, the most probable token at a time, as it comes.",
    ),
    (
        "capabilities",
        (_share_bundle, _share_json),
        _fill_capabilities,
        "find the tool that a request asks for",
        "Find the capabilities of claude-flow, agentic-flow and ruvector that a request asks for: "
        "commands, agents, hooks, workers, skills, MCP tools, crates and others, with a probability for each.",
    ),
    (
        "eval",
        (_share_bundle, _share_agents, _share_json),
        _fill_eval,
        "measure accuracy on labelled tasks",
        'Measure strategies on a JSON-lines file of {"task", "agent"} rows; "none" is out of scope.',
    ),
    (
        "memory",
        (),
        "cli_memory.fill_memory",
        "a store of texts: add, import, search, ...",
        "Work with a store of texts.",
    ),
    ("index", (), "cli_memory.fill_index", "an index of vectors", "Work with an index of vectors."),
    ("mcp", (_share_bundle, _share_agents), "mcp_server.fill", "serve tools to language models, by MCP", None),
    (
        "serve",
        (_share_bundle, _share_agents),
        "serve.fill",
        "serve over HTTP, embeddings as OpenAI's API has them",
        None,
    ),
    ("playground", (), "playground.fill", "try a bundle in the browser", None),
    ("hook", (), "hook.fill", "suggest an agent for each prompt in Claude Code", None),
    ("inspect", (_share_json,), _fill_inspect, "show what is in a bundle", None),
    (
        "device",
        (_share_json,),
        _fill_device,
        "show what this device has",
        "Show processor, cores and memory that may be used, accelerators, and ONNX Runtime's providers.",
    ),
    (
        "tune",
        (_share_json,),
        _fill_tune,
        "measure what runs a bundle best here, and remember it",
        "Measure every variant on every provider of this device, each in a process of its own, and keep "
        "the best for latency, throughput and memory in the user's cache folder.",
    ),
    (
        "doctor",
        (_share_json,),
        _fill_doctor,
        "prove a bundle on this device",
        "Recompute hashes, token ids and vectors on this device, and say what runs it, why, and how fast; "
        "exit status 1 if anything is wrong.",
    ),
)


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {MAX_THREADS}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError("must be a number of seconds above 0")
    return value


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError("must be KEY=VALUE")
    return key, value


def _progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Show a counter on a terminal's standard error while items pass."""
    shown = sys.stderr.isatty()
    for done, item in enumerate(items, 1):
        yield item
        if shown and (done % 20 == 0 or done == total):
            print(f"\r{what} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _route(options: argparse.Namespace) -> int:
    router = Router.load(options.bundle, agents=options.agents, strategy=options.strategy, **wanted(options))
    decision = None
    for task in texts(options.text):
        started = time.perf_counter()
        decision = router.route(task)
        milliseconds = (time.perf_counter() - started) * 1000
        print(
            json.dumps({"task": task} | decision.document() | {"ms": round(milliseconds, 3)})
            if options.json
            else _route_line(decision, milliseconds),
            flush=True,
        )
    single = len(options.text) == 1 and options.text != ["-"]
    return ABSTAINED if single and decision is not None and decision.agent is None else 0


def _route_line(decision: Decision, milliseconds: float) -> str:
    reasons = []
    if decision.matched:
        reasons.append(("keyword " if len(decision.matched) == 1 else "keywords ") + _quoted(decision.matched))
    top = decision.ranking[0]
    if top.cosine is not None and decision.method != "keyword":
        rival = f" over {decision.ranking[1].id} {decision.ranking[1].cosine:.2f}" if len(decision.ranking) > 1 else ""
        reasons.append(f"embedding {top.cosine:.2f}{rival}")
    if decision.agent is None:
        reasons.insert(0, f"nearest: {top.id}")
    if decision.truncated:
        reasons.append("only the beginning was read")
    name = decision.agent or "-"
    return f"{name:<10} {decision.confidence:.2f}   {decision.method} ({', '.join(reasons)})   {milliseconds:.1f} ms"


def _quoted(phrases: Sequence[str]) -> str:
    return ", ".join(f'"{phrase}"' for phrase in phrases)


def _embed(options: argparse.Namespace) -> int:
    encoder = Encoder.load(options.bundle, **wanted(options))
    if options.output is None:
        for text in texts(options.text):
            print(json.dumps({"text": text, "vector": encoder.encode([text])[0].tolist()}), flush=True)
        return 0
    every = list(texts(options.text))
    blocks = [every[start : start + _BLOCK] for start in range(0, len(every), _BLOCK)] or [[]]
    vectors = np.concatenate([encoder.encode(block) for block in _progress(blocks, len(blocks), "embedded, blocks")])
    path: Path = options.output
    try:
        path = path.resolve()
        if path.exists() and not path.is_file():  # a pipe or a device: there is nothing to rename
            with path.open("wb") as stream:
                np.save(stream, vectors)
            return 0
        with replaced(path) as partial, partial.open("wb") as stream:
            np.save(stream, vectors)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error}). Choose another path for --output.") from None
    return 0


def _generate(options: argparse.Namespace) -> int:
    from edge.generate import Generator

    generator = Generator.load(options.bundle, generator=options.generator, threads=options.threads)
    for piece in generator.stream(options.text, options.max_tokens):
        print(piece, end="", flush=True)
    print()
    return 0


def _capabilities(options: argparse.Namespace) -> int:
    from edge.capabilities import Capabilities

    bundle = Bundle.open(options.bundle)
    catalogue = Capabilities.load(bundle, encoder=Encoder.load(bundle, **wanted(options)))
    for number, request in enumerate(texts(options.text)):
        started = time.perf_counter()
        hits = catalogue.search(request, options.k, ecosystem=options.ecosystem)
        milliseconds = round((time.perf_counter() - started) * 1000, 3)
        if options.json:
            found = {"query": request, "hits": [hit._asdict() for hit in hits], "ms": milliseconds}
            print(json.dumps(found), flush=True)
            continue
        if number:
            print()
        for hit in hits:
            also = f"  (also {', '.join(hit.also)})" if hit.also else ""
            print(f"{hit.score:.2f}  {hit.id}{also}")
            print(f"      {hit.description}")
        if not hits:
            print("nothing is asked for")
        sys.stdout.flush()
    return 0


def _eval(options: argparse.Namespace) -> int:
    from edge.evaluate import evaluate, plot_confusion, read_labelled

    # A language model is asked only if that is wanted: most bundles have none, and it takes a hundred times as long.
    every = tuple(strategy for strategy in STRATEGIES if strategy != "generate")
    strategies = every if options.strategy == "all" else (options.strategy,)
    router = Router.load(
        options.bundle,
        agents=options.agents,
        strategy="hybrid" if options.strategy == "all" else options.strategy,
        **wanted(options),
    )
    rows = read_labelled(options.file, [agent.name for agent in router.agents])
    signals = _progress((router.signals(row.task) for row in rows), len(rows), "routed")
    scores = evaluate(router, rows, strategies, signals)
    _print_scores(options, scores)
    if options.plot:
        plot_confusion(scores[-1], options.plot, options.file.name)
    return 0


def _print_scores(options: argparse.Namespace, scores: list[Score]) -> None:
    if options.json:
        # The confusions hold the same counts in a form that JSON has.
        values = [{key: value for key, value in asdict(score).items() if key != "matrix"} for score in scores]
        print(json.dumps({"file": str(options.file), "scores": values}))
        return
    last = scores[-1]
    outside = last.abstain_recall.n
    print(f"{options.file}: {last.accuracy.n} tasks, {outside} out of scope. Intervals: 95 % Wilson.\n")
    columns = ("accuracy", "top-1", "abstain precision", "abstain recall", "in-scope abstained")
    print(f"{'strategy':<15}" + "".join(f"{column:<24}" for column in columns) + "AUROC   ECE")
    for score in scores:
        shares = (score.accuracy, score.top1, score.abstain_precision, score.abstain_recall, score.false_abstain)
        rate = "-" if score.auroc is None else f"{score.auroc:.3f}"
        print(f"{score.strategy:<15}" + "".join(f"{share!s:<24}" for share in shares) + f"{rate:<8}{score.ece:.3f}")
    print(f"\nBy agent ({last.strategy}):")
    for name, share in last.per_agent.items():
        print(f"  {name:<20}{share}  n = {share.n}")
    print(f"\nMost frequent confusions ({last.strategy}):")
    for true, given, times in last.confusions[:10]:
        print(f"  {times:>4}  {true} -> {given}")


def _inspect(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    summary: dict[str, Any] = {
        "path": str(bundle.path),
        "id": bundle.id,
        "name": bundle.name,
        "version": bundle.version,
        "licence": bundle.licence,
        "base_model": bundle.base_model,
        "encoder": bundle.encoder._asdict(),
        "variants": [_variant(variant) for variant in bundle.variants],
        "default_variant": bundle.default_variant,
        "agents": [agent.name for agent in bundle.agents],
        "head": _head(bundle),
        "goldens": len(bundle.goldens()),
        "capabilities": sum(len(ids) for ids, _ in bundle.capabilities()),
        "tools": bundle.tools,
    }
    try:
        encoder = Encoder.load(bundle)
        placement = encoder.placement
        summary["placement"] = None if placement is None else placement.document()
        runs = str(placement)
    except EdgeError as error:
        summary["placement"] = None
        runs = f"not here: {error}"
    if options.json:
        print(json.dumps(summary))
        return 0
    spec = bundle.encoder
    print(f"{bundle.name} {bundle.version} ({bundle.licence}), from {bundle.base_model}")
    print(f"  path       {bundle.path}")
    print(f"  id         {bundle.id}")
    print(f"  encoder    {spec.dim} values, up to {spec.max_length} tokens, {spec.pooling} pooling, unit length")
    print(f"  agents     {len(bundle.agents)}: {', '.join(agent.name for agent in bundle.agents)}")
    print(f"  head       {summary['head']}")
    print(f"  goldens    {len(bundle.goldens())}")
    if bundle.catalogue is not None:
        print(f"  catalogue  {summary['capabilities']} capabilities")
    for variant in bundle.variants:
        default = ", default" if variant.id == bundle.default_variant else ""
        print(f"  variant    {variant.id} ({variant.runtime}{default}): {variant.precision}")
        size = f"{variant.bytes / 1e6:.1f} MB"
        print(f"             {variant.model.file}, {size}, cosine to fp32 >= {variant.minimum_cosine}")
        print(f"             confidence calibrated on: {variant.calibrated_on or 'nothing; not a probability'}")
    print(f"  runs here  {runs}")
    print(f"  made with  {', '.join(f'{name} {version}' for name, version in bundle.tools.items())}")
    return 0


def _variant(variant: Variant) -> dict[str, Any]:
    files = {key: getattr(variant, key) for key in ("model", "weights", "package")}
    calibration = {
        kind: {strategy: weights._asdict() for strategy, weights in table.items()}
        for kind, table in variant.calibration.items()
    }
    return (
        asdict(variant)
        | {key: None if file is None else file._asdict() for key, file in files.items()}
        | {"calibration": calibration}
    )


def _head(bundle: Bundle) -> str:
    if bundle.head is None:
        return "prototypes from descriptions and examples"
    if bundle.head.linear is not None:
        return "linear"
    several = bundle.head.prototypes.shape[1]
    return "trained prototypes" if several == 1 else f"trained prototypes, {several} an agent"


def _device(options: argparse.Namespace) -> int:
    from edge.device import detect
    from edge.providers import installed

    device, rows = detect(), installed()
    if options.json:
        found = {"threads": device.threads, "fingerprint": device.fingerprint, "onnxruntime": onnxruntime.__version__}
        print(json.dumps(device._asdict() | found | {"providers": [row._asdict() for row in rows]}))
        return 0
    limit = "" if device.quota is None else f", limited to {device.quota:g} CPUs"
    memory = "unknown" if device.memory is None else f"{device.memory / 1e9:.1f} GB may be used"
    print(f"system       {device.system}, {device.machine}{f', {device.board}' if device.board else ''}")
    print(f"processor    {device.cpu}: {', '.join(device.features) or 'no features known'}")
    print(f"cores        {device.physical_cores} of {device.logical_cores} hardware threads' cores may be used{limit}")
    print(f"threads      {device.threads} are worth having{'; runs on a battery' if device.battery else ''}")
    print(f"memory       {memory}")
    print(f"accelerators {', '.join(device.accelerators) or 'no sign of any'}")
    print(f"ONNX Runtime {onnxruntime.__version__}")
    for row in rows:
        what = f": {', '.join(row.hardware)}" if row.hardware else ""
        why = f", of no use: {row.unusable}" if row.unusable else what
        print(f"provider     {row.name} ({row.source}){why}")
    return 0


def _tune(options: argparse.Namespace) -> int:
    from edge.tune import draw, tune

    shown = sys.stderr.isatty() and not options.json

    def progress(done: int, total: int, candidate: Candidate) -> None:
        if shown:
            bar = "#" * (20 * done // total)
            print(f"\r\033[K[{bar:<20}] {done}/{total} {candidate}", end="", file=sys.stderr, flush=True)

    bundle = Bundle.open(options.bundle)
    tuning = tune(bundle, seconds=options.seconds, limit=options.limit, progress=progress)
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(tuning.document()))
    else:
        print(tuning.table())
    if options.plot:
        draw(tuning, options.plot)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from edge.doctor import examine, examine_device

    checks = []
    for check in examine(options.bundle):
        checks.append(check)
        if not options.json:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}", flush=True)
    if all(check.ok for check in checks):
        for check in examine_device(options.bundle):
            checks.append(check)
            if not options.json:
                print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}", flush=True)
    healthy = all(check.ok for check in checks)
    if options.json:
        print(json.dumps({"ok": healthy, "checks": [asdict(check) for check in checks]}))
    elif not healthy:
        print("ruvltra: this bundle must not be used on this device.", file=sys.stderr)
    return 0 if healthy else 1


if __name__ == "__main__":
    run()
