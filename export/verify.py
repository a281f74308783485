"""Redoes the gates on a bundle that exists already."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.bundle import Bundle, Variant
from edge.doctor import Check, examine
from edge.encoder import Encoder
from edge.errors import InputError
from edge.evaluate import OUT_OF_SCOPE, Labelled
from edge.router import Router
from export.bundle import MAXIMUM_DROP
from export.calibrate import routed_rightly
from export.checkpoint import Checkpoint, load_checkpoint
from export.errors import CheckpointError
from export.parity import (
    NETWORK,
    NETWORK_BOUND,
    Inputs,
    Reference,
    Report,
    Run,
    judge,
    run_goldens,
    run_graph,
    run_network,
    run_original,
)
from export.variants import VARIANTS
from export.wrapper import BUNDLE_POOLING


def verify(
    path: Path, checkpoint_path: Path | None = None, labelled: Sequence[Labelled] = ()
) -> tuple[list[Check], list[Report]]:
    """Check hashes and goldens, and hold each graph against the stage before it.

    With a checkpoint that is the network, and the network is held against the checkpoint's own code;
    without one it is the bundle's fp32 graph, or its goldens where there is none. Bounds are those
    that the manifest records. One graph is in memory at a time.

    Args:
        path: The bundle.
        checkpoint_path: What it was made of; pooled as the bundle says, where it says nothing itself.
        labelled: Tasks whose routing is measured with each variant, and gated against the first stage.

    Returns:
        What :func:`edge.doctor.examine` says, and a report for each stage; none where a check fails.

    Raises:
        BundleError: The bundle cannot be opened.
        CheckpointError: The checkpoint cannot be used, or is not one that the bundle was made of.
        InputError: No labelled task is in scope.
    """
    if labelled and all(row.agent == OUT_OF_SCOPE for row in labelled):
        raise InputError("all labelled tasks are out of scope. Give tasks of the bundle's agents.")
    bundle = Bundle.open(path)
    checks = list(examine(path))
    if not all(check.ok for check in checks):
        return checks, []
    held = [variant for variant in bundle.variants if variant.runtime == "onnx" and variant.id in VARIANTS]
    names = [agent.name for agent in bundle.agents]
    reports: list[Report] = []
    hits: dict[str, NDArray[np.bool_]] = {}
    if checkpoint_path is not None:
        checkpoint = _checkpoint(bundle, checkpoint_path)
        inputs = Inputs.of_checkpoint(checkpoint)
        original = run_original(checkpoint)
        run = run_network(checkpoint)
        if original is not None:
            first = Reference(inputs, "checkpoint", original)
            reports.append(first.compare(run, NETWORK, NETWORK_BOUND, NETWORK_BOUND))
        reference = Reference(inputs, NETWORK, run)
        if labelled:
            calibration = bundle.variant().calibration["trained"]
            encoder = Encoder(bundle, _Network(run))
            router = Router(bundle.agents, dict(calibration), encoder=encoder, head=bundle.head)
            hits[NETWORK] = routed_rightly([router.signals(row.task) for row in labelled], labelled, names)
    elif any(variant.id == "fp32" for variant in held):
        encoder = Encoder.load(bundle)
        inputs = Inputs.of(lambda texts: [list(encoder.tokenize(t).ids) for t in texts], bundle.encoder.max_length)
        with _graph(bundle, bundle.variant("fp32")) as run:
            reference = Reference(inputs, "fp32", run)
    else:
        goldens = bundle.goldens()
        reference = Reference(Inputs.of_goldens(goldens), "goldens", run_goldens(goldens))
    for variant in held:
        if labelled:
            router = Router.load(bundle, variant=variant.id, strategy="embedding")
            hits[variant.id] = routed_rightly([router.signals(row.task) for row in labelled], labelled, names)
        if variant.id != reference.name:
            with _graph(bundle, variant) as run:
                elsewhere = min(VARIANTS[variant.id].elsewhere, variant.minimum_cosine)
                report = reference.compare(run, variant.id, variant.minimum_cosine, elsewhere)
            drop = variant.parity.get("maximum_drop", MAXIMUM_DROP)
            reports.append(judge(replace(report, bytes=variant.bytes), hits, reference.name, drop))
    return checks, reports


class _Network:
    """A network in the place of a bundle's graph."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._run(ids, mask)


def _checkpoint(bundle: Bundle, path: Path) -> Checkpoint:
    known = {name: mode for mode, name in BUNDLE_POOLING.items()}
    pooling = bundle.encoder.pooling
    alone = None if "+" in pooling else known.get(pooling, pooling)
    checkpoint = load_checkpoint(path, pooling=alone)
    if checkpoint.dim != bundle.encoder.dim:
        raise CheckpointError(
            f"{path}: gives {checkpoint.dim} values, the bundle {bundle.encoder.dim}. Give the checkpoint that the "
            "bundle was made of."
        )
    return replace(checkpoint, max_length=min(checkpoint.max_length, bundle.encoder.max_length))


@contextlib.contextmanager
def _graph(bundle: Bundle, variant: Variant) -> Iterator[Run]:
    """The variant's graph: a folder's where it lies, a zip's from a copy."""
    model = bundle.locate(variant.model)
    if isinstance(model, Path):
        if variant.weights is not None:
            bundle.locate(variant.weights)
        yield run_graph(model)
        return
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, variant.model.file)
        path.write_bytes(model)
        if variant.weights is not None:
            Path(name, variant.weights.file).write_bytes(bundle.read(variant.weights))
        yield run_graph(path)
