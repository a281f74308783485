"""Do CoreML packages decide as the fp32 graph does? Packages run in the evaluator; no Mac is needed.

    python -m benchmarks.coreml BUNDLE FILE.jsonl [--fp32 BUNDLE] [--json OUT]

BUNDLE has CoreML packages and an fp32 variant (`ruvltra-export bundle CHECKPOINT --recipe RECIPE --variants
fp32,coreml-ane-int8 --out BUNDLE`), or --fp32 names another bundle of the same checkpoint that has one. Each
row of the labelled file is routed by fp32 and by each package, each with its own calibration; a decision is an
agent, or abstaining.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from edge.bundle import Bundle
from edge.encoder import Encoder
from edge.evaluate import Proportion, read_labelled
from edge.router import Router
from export.mil import MilProgram
from export.parity import RunBackend, run_package
from export.residency import measure_residency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("rows", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--fp32", type=Path, metavar="BUNDLE")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    rows = read_labelled(options.rows, [agent.name for agent in bundle.agents])
    exact = Router.load(options.fp32 or bundle, variant="fp32")
    expected = [decision.agent for decision in exact.route_many(row.task for row in rows)]
    results = []
    for variant in (v for v in bundle.variants if v.runtime == "coreml"):
        program = MilProgram(options.bundle / f"{variant.id}.mlpackage")
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
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
