"""Redoes the gates on a bundle that exists already."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.bundle import Bundle, File, Generator
from edge.doctor import Check, examine
from edge.encoder import Encoder
from edge.errors import InputError
from edge.evaluate import OUT_OF_SCOPE, Labelled
from edge.router import Router
from export.bundle import MAXIMUM_DROP
from export.calibrate import routed_rightly
from export.checkpoint import Checkpoint, load_checkpoint
from export.errors import CheckpointError
from export.generator import STEPS, prove_generator
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
    path: Path, checkpoint_path: Path | None = None, labelled: Sequence[Labelled] = (), quiet: bool = True
) -> tuple[list[Check], list[Report]]:
    """Check hashes and goldens, and hold each graph against the stage before it.

    With a checkpoint that is the network, and the network is held against the checkpoint's own code;
    without one it is the bundle's fp32 graph, or its goldens where there is none. Bounds are those
    that the manifest records. One graph is in memory at a time.

    Args:
        path: The bundle.
        checkpoint_path: What it was made of; pooled as the bundle says, where it says nothing itself.
        labelled: Tasks whose routing is measured with each variant, and gated against the first stage.
        quiet: No progress bar while a GGUF file is read.

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
        checkpoint = _checkpoint(bundle, checkpoint_path, quiet)
        inputs = Inputs.of_checkpoint(checkpoint)
        original = run_original(checkpoint)
        run = run_network(checkpoint)
        if original is not None:
            first = Reference(inputs, "checkpoint", original)
            reports.append(first.compare(run, NETWORK, NETWORK_BOUND, NETWORK_BOUND))
        reference = Reference(inputs, NETWORK, run)
        checks += [_generates(bundle, generator, checkpoint) for generator in bundle.generators]
        if labelled:
            calibration = bundle.variant().calibration["trained"]
            encoder = Encoder(bundle, _Network(run))
            router = Router(bundle.agents, dict(calibration), encoder=encoder, head=bundle.head)
            hits[NETWORK] = routed_rightly([router.signals(row.task) for row in labelled], labelled, names)
    elif any(variant.id == "fp32" for variant in held):
        encoder = Encoder.load(bundle)
        inputs = Inputs.of(lambda texts: [list(encoder.tokenize(t).ids) for t in texts], bundle.encoder.max_length)
        first_one = bundle.variant("fp32")
        with _placed(bundle, first_one.model, first_one.weights) as graph:
            reference = Reference(inputs, "fp32", run_graph(graph))
    else:
        goldens = bundle.goldens()
        reference = Reference(Inputs.of_goldens(goldens), "goldens", run_goldens(goldens))
    for variant in held:
        if labelled:
            router = Router.load(bundle, variant=variant.id, strategy="embedding")
            hits[variant.id] = routed_rightly([router.signals(row.task) for row in labelled], labelled, names)
        if variant.id != reference.name:
            with _placed(bundle, variant.model, variant.weights) as graph:
                elsewhere = min(VARIANTS[variant.id].elsewhere, variant.minimum_cosine)
                report = reference.compare(run_graph(graph), variant.id, variant.minimum_cosine, elsewhere)
            drop = variant.parity.get("maximum_drop", MAXIMUM_DROP)
            reports.append(judge(replace(report, bytes=variant.bytes), hits, reference.name, drop))
    return checks, reports


class _Network:
    """A network in the place of a bundle's graph."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._run(ids, mask)


def _checkpoint(bundle: Bundle, path: Path, quiet: bool) -> Checkpoint:
    known = {name: mode for mode, name in BUNDLE_POOLING.items()}
    pooling = bundle.encoder.pooling
    alone = None if "+" in pooling else known.get(pooling, pooling)
    checkpoint = load_checkpoint(path, pooling=alone, quiet=quiet)
    if checkpoint.dim != bundle.encoder.dim:
        raise CheckpointError(
            f"{path}: gives {checkpoint.dim} values, the bundle {bundle.encoder.dim}. Give the checkpoint that the "
            "bundle was made of."
        )
    return replace(checkpoint, max_length=min(checkpoint.max_length, bundle.encoder.max_length))


def _generates(bundle: Bundle, generator: Generator, checkpoint: Checkpoint) -> Check:
    """The exporter's gate for a generating graph, redone."""
    if checkpoint.language_model is None:
        raise CheckpointError(f"{checkpoint.folder}: cannot generate, but the bundle can. Give what it was made of.")
    sizes = (generator.layers, generator.kv_heads, generator.head_dim)
    with _placed(bundle, generator.model, generator.weights) as path:
        texts, different = prove_generator(checkpoint, path, *sizes)
    detail = f"{texts - len(different)} of {texts} texts give the network's next {STEPS} tokens"
    return Check(f"generator {generator.id}", not different, detail)


@contextlib.contextmanager
def _placed(bundle: Bundle, model: File, weights: File | None) -> Iterator[Path]:
    """A graph beside its weights: a folder's where it lies, a zip's as a copy."""
    files = [model] if weights is None else [model, weights]
    places = [bundle.locate(file) for file in files]
    if isinstance(places[0], Path):
        yield places[0]
        return
    with tempfile.TemporaryDirectory() as name:
        for file, data in zip(files, places, strict=True):
            assert isinstance(data, bytes)
            Path(name, file.file).write_bytes(data)
        yield Path(name, model.file)
