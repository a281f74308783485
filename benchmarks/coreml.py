"""Do CoreML packages compute and decide as the originals do? Packages run in the evaluator; no Mac is needed.

    python -m benchmarks.coreml BUNDLE FILE.jsonl [--fp32 BUNDLE] [--json OUT]
    python -m benchmarks.coreml --decoder FILE.gguf [--layers N] [--packages NAME,NAME]

The first: BUNDLE has CoreML packages and an fp32 variant (`ruvltra-export bundle CHECKPOINT --recipe RECIPE --variants
fp32,coreml-ane-int8 --out BUNDLE`), or --fp32 names another bundle of the same checkpoint that has one. Each
row of the labelled file is routed by fp32 and by each package, each with its own calibration; a decision is an
agent, or abstaining.

The second: packages of a Llama- or Qwen2-like decoder, or of its first N layers, each made in a process of its own for
its peak memory, and held against the network in torch on tasks and on a text of the longest length.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from edge.bundle import Bundle
from edge.encoder import Encoder
from edge.evaluate import Proportion, read_labelled
from edge.router import Router
from export.checkpoint import Checkpoint, load_checkpoint
from export.coreml import LENGTHS, PACKAGES, About, convert
from export.mil import Arguments, Array, MilProgram, Operation
from export.parity import Run, RunBackend, parity_texts, run_network, run_package
from export.residency import measure_residency

TASKS = 8


def decide(bundle_path: Path, rows_path: Path, fp32: Path | None, out: Path | None) -> None:
    """Route with each package and with fp32."""
    bundle = Bundle.open(bundle_path)
    rows = read_labelled(rows_path, [agent.name for agent in bundle.agents])
    exact = Router.load(fp32 or bundle, variant="fp32")
    expected = [decision.agent for decision in exact.route_many(row.task for row in rows)]
    results = []
    for variant in (v for v in bundle.variants if v.runtime == "coreml"):
        program = MilProgram(bundle_path / f"{variant.id}.mlpackage")
        encoder = Encoder(bundle, RunBackend(run_package(program)), lengths=variant.lengths)
        kind = "custom" if bundle.head is None else "trained"
        router = Router(bundle.agents, dict(variant.calibration[kind]), encoder=encoder, head=bundle.head)
        started = time.monotonic()
        found = [router.route(row.task).agent for row in tqdm(rows, desc=variant.id, unit="task")]
        seconds = time.monotonic() - started
        equal = Proportion.of(sum(a == b for a, b in zip(expected, found, strict=True)), len(rows))
        right = Proportion.of(sum((a or "none") == r.agent for a, r in zip(found, rows, strict=True)), len(rows))
        residency = [measure_residency(program, length) for length in variant.lengths]
        print(f"{variant.id}: {variant.bytes / 1e6:.1f} MB, n = {len(rows)}: the same decision as fp32 for {equal}")
        print(f"  right, out of scope included: {right}; evaluator {1000 * seconds / len(rows):.0f} ms a task")
        for one in residency:
            print(
                f"  {one.tokens} tokens: {one.share:.1%} of {one.macs / 1e6:.0f} M multiplications in a form for the "
                f"Neural Engine, {sum(one.against.values())} objections in the hot path, {one.transposes} transposes"
            )
        documents = [one.document() for one in residency]
        results.append({"variant": variant.id, "equal": asdict(equal), "right": asdict(right), "residency": documents})
        if out:
            out.write_text(json.dumps(results, indent=2) + "\n")


def prove(file: Path, layers: int | None, name: str) -> None:
    """Convert a decoder to a package, and run it beside the network."""
    checkpoint = load_checkpoint(file, max_length=LENGTHS[-1])
    if layers:
        checkpoint.backbone.layers = checkpoint.backbone.layers[:layers]
        checkpoint.backbone.config.num_hidden_layers = layers
    loaded = peak()
    package = PACKAGES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.mlpackage")
        about = About(file.stem, "0", "unknown", "benchmark", file.name)
        made = convert(checkpoint, package.profile, path, about, package.compression)
        converted = peak()
        program = MilProgram(path)
        config = checkpoint.backbone.config
        print(
            f"{file.stem}, {config.num_hidden_layers} layers, {checkpoint.pooling[0]} pooling: {name}, "
            f"{made.bytes / 1e6:.1f} MB, made in {made.seconds:.0f} s; peak memory {loaded:.1f} GB loaded, "
            f"{converted:.1f} GB converted"
        )
        if made.compressed:
            print(f"  {made.compressed} weights compressed; left: {', '.join(made.kept)}")
        rows = texts(checkpoint)
        expected = vectors_of(run_network(checkpoint), rows)
        for mode in ("float32", "declared"):
            started = time.monotonic()
            cosines = np.array(
                [
                    float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
                    for a, b in zip(expected, vectors_of(run_package(program, mode), rows), strict=True)
                ]
            )
            seconds = (time.monotonic() - started) / len(rows)
            print(
                f"  {mode}: cosine min {cosines.min():.7f}, mean {cosines.mean():.7f} on {len(rows)} texts of "
                f"{min(map(len, rows))} to {max(map(len, rows))} tokens, {seconds:.1f} s each"
            )
        largest, broken = extremes(program, rows[-1])
        residency = measure_residency(program, LENGTHS[-1])
        print(
            f"  half precision: {broken} operations with values that are not finite; largest value of a sum "
            f"{largest:.0f}\n"
            f"  {residency.share:.1%} of {residency.macs / 1e6:.0f} M multiplications in a form for the Neural Engine, "
            f"{sum(residency.against.values())} objections in the hot path, {residency.transposes} transposes",
            flush=True,
        )


def texts(checkpoint: Checkpoint) -> list[list[int]]:
    """Ids of tasks, and of as many of them in one as the longest length takes."""
    tasks = parity_texts("tasks")
    return [*checkpoint.tokenize(tasks[:TASKS]), *checkpoint.tokenize([" ".join(tasks)], LENGTHS[-1])]


def vectors_of(run: Run, rows: Sequence[list[int]]) -> list[NDArray[np.float32]]:
    return [run(np.array([row]), np.ones((1, len(row)), np.int64))[0] for row in rows]


def extremes(program: MilProgram, row: list[int]) -> tuple[float, int]:
    """The largest value of an addition in half precision, and how many operations give values that are not finite."""
    sums, broken = [0.0], 0

    def observe(operation: Operation, arguments: Arguments, results: Sequence[Array]) -> None:
        del arguments
        nonlocal broken
        broken += not all(np.isfinite(one).all() for one in results)
        # Masked logits are around -10,000 by intention.
        if operation.kind == "add" and operation.valued and "causal" not in str(operation.inputs["y"]):
            sums.append(float(np.abs(results[0]).max()))

    program.run({"input_ids": np.array([row], np.int32)}, "declared", observe)
    return max(sums), broken


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    parser.add_argument("rows", type=Path, nargs="?", metavar="FILE.jsonl")
    parser.add_argument("--fp32", type=Path, metavar="BUNDLE")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--decoder", type=Path, metavar="FILE.gguf")
    parser.add_argument("--layers", type=int, metavar="N")
    parser.add_argument(
        "--packages", default="coreml-metal,coreml-ane,coreml-ane-int8,coreml-metal-palette4", metavar="NAME,NAME"
    )
    options = parser.parse_args()
    if options.decoder is None:
        if options.rows is None:
            parser.error("give a bundle and a labelled file, or --decoder")
        decide(options.bundle, options.rows, options.fp32, options.json)
        return
    names = options.packages.split(",")
    if len(names) == 1:
        prove(options.decoder, options.layers, names[0])
        return
    for name in names:
        command = [sys.executable, "-m", "benchmarks.coreml", "--decoder", str(options.decoder), "--packages", name]
        subprocess.run([*command, *(["--layers", str(options.layers)] if options.layers else [])], check=True)


if __name__ == "__main__":
    main()
