"""Redoes the gates on a bundle that exists already."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edge.bundle import Bundle, Variant
from edge.doctor import Check, examine
from edge.encoder import Encoder
from edge.evaluate import OUT_OF_SCOPE, Labelled
from edge.router import Router
from export.checkpoint import load_checkpoint
from export.errors import CheckpointError
from export.parity import NETWORK, NETWORK_BOUND, Inputs, Reference, Report, Run, run_graph, run_network, run_original
from export.variants import VARIANTS


def verify(
    path: Path, checkpoint_path: Path | None = None, labelled: Sequence[Labelled] = ()
) -> tuple[list[Check], list[Report]]:
    """Check hashes and goldens, and hold each graph against the stage before it.

    Without a checkpoint the fp32 graph is what the others are held against; a bundle without one is
    held against its goldens only. Bounds are those that the manifest records.

    Args:
        path: The bundle.
        checkpoint_path: What it was made of.
        labelled: Tasks whose routing is measured with each variant.

    Returns:
        What :func:`edge.doctor.examine` says, and a report for each stage.

    Raises:
        BundleError: The bundle cannot be opened.
        CheckpointError: The checkpoint cannot be used, or is not one that the bundle was made of.
    """
    bundle = Bundle.open(path)
    checks = list(examine(path))
    variants = [v for v in bundle.variants if v.runtime == "onnx" and v.id in VARIANTS]
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as name:
        runs = {variant.id: _run(bundle, variant, Path(name)) for variant in variants}
        if checkpoint_path is None:
            encoder = Encoder.load(bundle)
            inputs = Inputs.of(lambda texts: [list(encoder.tokenize(t).ids) for t in texts], bundle.encoder.max_length)
            reference = Reference(inputs, "fp32", runs["fp32"]) if "fp32" in runs else None
            held = [variant for variant in variants if variant.id != "fp32"]
        else:
            checkpoint = load_checkpoint(checkpoint_path)
            if checkpoint.dim != bundle.encoder.dim:
                raise CheckpointError(
                    f"{checkpoint_path}: gives {checkpoint.dim} values, the bundle {bundle.encoder.dim}. Give the "
                    "checkpoint that the bundle was made of."
                )
            checkpoint = replace(checkpoint, max_length=min(checkpoint.max_length, bundle.encoder.max_length))
            inputs = Inputs.of_checkpoint(checkpoint)
            original = run_original(checkpoint)
            if original is not None:
                first = Reference(inputs, "checkpoint", original)
                reports.append(first.compare(run_network(checkpoint), NETWORK, NETWORK_BOUND, NETWORK_BOUND))
            reference = Reference(inputs, NETWORK, run_network(checkpoint))
            held = variants
        if reference is not None:
            for variant in held:
                elsewhere = min(VARIANTS[variant.id].elsewhere, variant.minimum_cosine)
                report = reference.compare(runs[variant.id], variant.id, variant.minimum_cosine, elsewhere)
                reports.append(replace(report, bytes=variant.bytes))
    if labelled:
        reports = [_with_accuracy(report, bundle, labelled) for report in reports]
    return checks, reports


def _run(bundle: Bundle, variant: Variant, folder: Path) -> Run:
    """The variant's graph, from a copy that holds for a zip as well."""
    (folder / variant.model.file).write_bytes(bundle.read(variant.model))
    if variant.weights is not None:
        (folder / variant.weights.file).write_bytes(bundle.read(variant.weights))
    return run_graph(folder / variant.model.file)


def _with_accuracy(report: Report, bundle: Bundle, labelled: Sequence[Labelled]) -> Report:
    if report.stage not in {variant.id for variant in bundle.variants}:
        return report
    router = Router.load(bundle, variant=report.stage, strategy="embedding")
    inside = [row for row in labelled if row.agent != OUT_OF_SCOPE]
    right = sum(router.route(row.task).ranking[0].id == row.agent for row in inside)
    return replace(report, accuracy=right / len(inside))
