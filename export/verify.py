"""Redoes the gates on a bundle that exists already."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from edge.bundle import Bundle, File, Variant
from edge.decoder import Sizes
from edge.doctor import Check, examine
from edge.encoder import Encoder
from edge.errors import InputError
from edge.evaluate import OUT_OF_SCOPE, Labelled
from edge.router import Router
from export.bundle import MAXIMUM_DROP
from export.calibrate import Routed
from export.checkpoint import Checkpoint, load_checkpoint
from export.coreml import PACKAGES
from export.errors import CheckpointError
from export.generator import ask_network, prove_generator
from export.mil import MilProgram
from export.parity import (
    NETWORK,
    Inputs,
    Reference,
    Report,
    Run,
    RunBackend,
    judge,
    refer_to_network,
    run_goldens,
    run_graph,
    run_network,
    run_package,
)
from export.residency import judge_residency
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
    held = [variant for variant in bundle.variants if variant.id in VARIANTS or variant.id in PACKAGES]
    longest = min((variant.lengths[-1] for variant in held if variant.lengths), default=None)
    short = None  # the first stage on texts that packages can take
    names = [agent.name for agent in bundle.agents]
    reports: list[Report] = []
    routed: dict[str, Routed] = {}
    if checkpoint_path is not None:
        checkpoint = _checkpoint(bundle, checkpoint_path, quiet)
        inputs = Inputs.of_checkpoint(checkpoint)
        run = run_network(checkpoint)
        reference, found = refer_to_network(checkpoint, inputs)
        reports += found
        if longest is not None:
            short = Reference(Inputs.of_checkpoint(checkpoint, longest), NETWORK, run)
        checks += _generators(bundle, checkpoint)
        if labelled:
            calibration = bundle.variant().calibration["trained"]
            router = Router(
                bundle.agents, dict(calibration), encoder=Encoder(bundle, RunBackend(run)), head=bundle.head
            )
            routed[NETWORK] = Routed.of([router.signals(row.task) for row in labelled], labelled, names)
    elif any(variant.id == "fp32" for variant in held):
        encoder = Encoder.load(bundle, device="cpu")

        def inputs_of(encoder: Encoder) -> Inputs:
            return Inputs.of(lambda texts: [list(encoder.tokenize(t).ids) for t in texts], encoder.max_length)

        with _stage(bundle, bundle.variant("fp32")) as stage:
            reference = Reference(inputs_of(encoder), "fp32", stage)
            if longest is not None:
                short = Reference(inputs_of(Encoder(bundle, RunBackend(stage), lengths=(longest,))), "fp32", stage)
    else:
        goldens = bundle.goldens()
        reference = Reference(Inputs.of_goldens(goldens), "goldens", run_goldens(goldens))
    for variant in held:
        with _stage(bundle, variant) as stage:
            if labelled:
                encoder = Encoder(bundle, RunBackend(stage), lengths=variant.lengths)
                router = Router(bundle.agents, dict(variant.calibration["trained"]), encoder=encoder, head=bundle.head)
                routed[variant.id] = Routed.of([router.signals(row.task) for row in labelled], labelled, names)
            if variant.id != reference.name:
                known = VARIANTS.get(variant.id) or PACKAGES[variant.id]
                elsewhere = min(known.elsewhere, variant.minimum_cosine)
                within = short if variant.lengths and short is not None else reference
                report = within.compare(stage, variant.id, variant.minimum_cosine, elsewhere)
                if variant.runtime == "coreml":
                    report = _with_residency(report, bundle, variant)
                drop = variant.parity.get("maximum_drop", MAXIMUM_DROP)
                report = replace(report, bytes=variant.bytes)
                reports.append(judge(report, routed, reference.name, drop, variant.id in PACKAGES))
    return checks, reports


@contextlib.contextmanager
def _stage(bundle: Bundle, variant: Variant) -> Iterator[Run]:
    """A variant, ready to run: an ONNX graph by ONNX Runtime, a CoreML package by the evaluator."""
    with _placed(bundle, variant.files) as path:
        if variant.runtime == "onnx":
            yield run_graph(path)
        else:
            yield run_package(MilProgram(path.parents[2]))  # PACKAGE/Data/com.apple.CoreML/model.mlmodel


def _with_residency(report: Report, bundle: Bundle, variant: Variant) -> Report:
    with _placed(bundle, variant.files) as path:
        held = PACKAGES[variant.id].profile.resident
        return judge_residency(report, MilProgram(path.parents[2]), variant.lengths[-1], held)


def _checkpoint(bundle: Bundle, path: Path, quiet: bool) -> Checkpoint:
    known = {name: mode for mode, name in BUNDLE_POOLING.items()}
    pooling = bundle.encoder.pooling
    alone = None if "+" in pooling else known.get(pooling, pooling)
    checkpoint = load_checkpoint(path, pooling=alone, longest=bundle.encoder.max_length, quiet=quiet)
    if checkpoint.dim != bundle.encoder.dim:
        raise CheckpointError(
            f"{path}: gives {checkpoint.dim} values, the bundle {bundle.encoder.dim}. Give the checkpoint that the "
            "bundle was made of."
        )
    return replace(checkpoint, max_length=min(checkpoint.max_length, bundle.encoder.max_length))


def _generators(bundle: Bundle, checkpoint: Checkpoint) -> list[Check]:
    """The exporter's gate for generating graphs, redone."""
    if not bundle.generators:
        return []
    if checkpoint.language_model is None:
        raise CheckpointError(f"{checkpoint.folder}: cannot generate, but the bundle can. Give what it was made of.")
    answers = ask_network(checkpoint)
    checks = []
    for generator in bundle.generators:
        sizes = Sizes(generator.layers, generator.kv_heads, generator.head_dim)
        with _placed(bundle, (generator.model, generator.weights)) as path:
            proof = prove_generator(answers, path, sizes)
        checks.append(Check(f"generator {generator.id}", proof.exact or generator.id != "fp32", str(proof)))
    return checks


@contextlib.contextmanager
def _placed(bundle: Bundle, files: Sequence[File]) -> Iterator[Path]:
    """The first of some files, with the others in their places: a folder's where they lie, a zip's as copies."""
    places = [bundle.locate(file) for file in files]
    if isinstance(places[0], Path):
        yield places[0]
        return
    with tempfile.TemporaryDirectory() as name:
        for file, data in zip(files, places, strict=True):
            assert isinstance(data, bytes)
            path = Path(name, file.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield Path(name, files[0].file)
