"""Writes bundles: export, prove stage by stage, calibrate, and only then put the folder in its place."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from edge.agents import Agent
from edge.bundle import FORMAT, MANIFEST, MANIFEST_DIGEST, Bundle, Calibration, Variant, manifest_digest
from edge.bundle import Head as ShippedHead
from edge.doctor import examine
from edge.encoder import Encoder
from edge.errors import InputError
from edge.evaluate import OUT_OF_SCOPE, Labelled
from edge.router import Router, Signals
from export.ane import check_supported, padding_of
from export.calibrate import UNCALIBRATED, Routed, calibrate
from export.checkpoint import Checkpoint, Head
from export.coreml import LENGTHS, MINIMUM_OS, PACKAGES, About, convert
from export.errors import CheckpointError, ParityError, ToolchainError
from export.generator import calibrate_generator, check_generating, export_generators
from export.mil import MilProgram
from export.onnx import export_fp32, weights_path
from export.parity import (
    NETWORK,
    Inputs,
    Reference,
    Report,
    RunBackend,
    judge,
    parity_texts,
    refer_to_network,
    run_graph,
    run_network,
    run_package,
    table,
)
from export.residency import judge_residency
from export.search import Measured, measure, pareto, write_card
from export.variants import VARIANTS
from export.wrapper import BUNDLE_POOLING

AUTO = "auto"
MAXIMUM_DROP = 0.005  # share of labelled tasks that a variant may lose against fp32
REPORT = "parity.json"
_GOLDENS = 20
_AUTHOR = "ruvltra-edge"
_TOOLS = (
    *("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "optimum-onnx", "tokenizers", "numpy", "gguf"),
    "coremltools",
)


@dataclass(frozen=True, slots=True)
class Identity:
    """What the manifest says of a bundle's origin."""

    name: str
    version: str
    licence: str
    base_model: str


@dataclass(frozen=True, slots=True)
class Gates:
    """Bounds in place of the table's.

    Attributes:
        minimum_cosine: By variant.
        maximum_drop: Share of labelled tasks that a variant may lose against fp32, and that a CoreML package may
            decide otherwise, beyond chance.
    """

    minimum_cosine: Mapping[str, float]
    maximum_drop: float = MAXIMUM_DROP


def build_bundle(
    checkpoint: Checkpoint,
    out: Path,
    *,
    identity: Identity,
    agents: Sequence[Agent],
    variants: Sequence[str] = ("fp32", "int8"),
    generate: bool = False,
    labelled: Sequence[Labelled] = (),
    labelled_name: str | None = None,
    like: Bundle | None = None,
    gates: Gates | None = None,
    replace: bool = False,
    quiet: bool = False,
) -> list[Report]:
    """Turn a checkpoint into a verified bundle.

    The bundle is put together in a temporary folder beside ``out`` and takes its place by one
    rename after every gate has passed, so that there is never half a bundle. Where an old one is
    replaced, it is moved aside first.

    Args:
        checkpoint: What to export.
        out: Where the bundle shall be.
        identity: Name, version, licence and base model for the manifest.
        agents: The agents to route to. If the checkpoint has a trained head, the same ones.
        variants: Which graphs and CoreML packages to ship, of ``VARIANTS`` and ``PACKAGES``; the last
            graph is the default. ``auto`` alone measures all graphs on this machine, ships those that no
            other beats in size, time and cosine, and makes the quickest the default.
        generate: Ship generating graphs as well; the checkpoint must be a causal language model.
        labelled: Tasks to calibrate on and to judge variants by; without any, confidences are
            marked as uncalibrated.
        labelled_name: What the manifest calls them.
        like: Where there are none, takes over the calibration of this bundle, from which the
            checkpoint was adapted.
        gates: Other bounds than the table's.
        replace: Replace an existing ``out``.
        quiet: No progress on standard error.

    Returns:
        A report for each stage.

    Raises:
        ParityError: A stage misses its bound. No bundle was written, but a report beside ``out``.
        CheckpointError: The checkpoint's head is of other agents, or it cannot generate.
        InputError: ``out`` exists, or an unknown variant was asked for.
    """
    gates = gates or Gates({})
    out = Path(os.path.abspath(out))  # noqa: PTH100 ("." needs a name, and resolve() would follow a link)
    check_arguments(out, variants=variants, labelled=labelled, gates=gates, replace=replace)
    search = tuple(variants) == (AUTO,)
    wanted = tuple(VARIANTS) if search else tuple(variant for variant in variants if variant in VARIANTS)
    packages = tuple(variant for variant in variants if variant in PACKAGES)
    _check(checkpoint, agents, labelled, like, packages)
    if generate:
        check_generating(checkpoint, wanted)
    reports: list[Report] = []
    steps = tqdm(total=4 + 2 * len({"fp32", *wanted, *packages}) + generate, disable=quiet, unit="step")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))

    def step(description: str) -> None:
        steps.update()
        steps.set_description(description)

    try:
        steps.set_description("export fp32")
        fp32 = work / "model.fp32.onnx"
        export_fp32(checkpoint.encoder().eval(), fp32)
        step("parity network")
        inputs = Inputs.of_checkpoint(checkpoint)
        reference, found = refer_to_network(checkpoint, inputs)
        reports += found
        step("parity fp32")
        reports.append(_with_size(reference.compare(run_graph(fp32), "fp32", *_bounds("fp32", gates)), fp32))
        _refuse(reports)
        reference = Reference(inputs, "fp32", run_graph(fp32))
        rows = checkpoint.tokenize(parity_texts("calibration"))
        for name in wanted:
            if name != "fp32":
                step(f"parity {name}")
                try:
                    reports.append(_variant(reference, name, fp32, work, rows, gates))
                except ToolchainError:
                    if not search:  # a search goes on without what cannot be made
                        raise
        if packages:
            network = run_network(checkpoint)
            reference = Reference(Inputs.of_checkpoint(checkpoint, LENGTHS[-1]), NETWORK, network)
        for name in packages:
            step(f"convert {name}")
            reports.append(_package(reference, name, checkpoint, work, identity, gates))
        if not search:
            _refuse(reports)
        passed = [r.stage for r in reports if r.stage != NETWORK and not r.failures]
        generators = []
        if generate:
            step("export generators")
            generators += export_generators(checkpoint, work, [name for name in wanted if name in passed])
        step("goldens and calibration")
        _write_parts(work, checkpoint, agents)
        manifest = _manifest(work, checkpoint, identity, passed, reports, gates, generators)
        write_manifest(work, manifest)
        routed: dict[str, Routed] = {}
        for entry in manifest["variants"]:
            step(f"calibrate {entry['id']}")
            if labelled:
                routed[entry["id"]] = _calibrate(work, entry, agents, labelled)
                entry["calibrated_on"] = (
                    f"{labelled_name}, {len(labelled)} tasks" if labelled_name else str(len(labelled))
                )
            elif like is not None:
                _take_over(entry, like)
        for entry in manifest["generators"] if labelled else ():
            steps.set_description(f"calibrate generator {entry['id']}")
            calibrate_generator(Bundle.open(work), entry, labelled, [agent.name for agent in agents])
            entry["calibrated_on"] = labelled_name or str(len(labelled))
        if labelled:
            reports = [judge(r, routed, "fp32", gates.maximum_drop, r.stage in PACKAGES) for r in reports]
            if not search:
                _refuse(reports)
        passed = [r.stage for r in reports if r.stage in VARIANTS and not r.failures]
        measured: list[Measured] = []
        if search:
            step("measure")
            measured = measure(work, passed, reports, rows)
            wanted = pareto(measured)
        _keep(work, manifest, wanted, packages, reports)
        write_json(work / REPORT, {"stages": [report.document() for report in reports]})
        documents = [REPORT]
        if search:
            documents += write_card(work, identity.name, measured, wanted, reports)
        manifest["documents"] = [listed(work, name) for name in documents]
        write_manifest(work, manifest)
        steps.set_description("verify")
        for check in examine(work):
            if not check.ok:
                raise ParityError(
                    f"the finished bundle fails its own check {check.name!r}. No bundle was written. Leave the variant "
                    "out, or report it with the file below.",
                    f"FAILED: {check.name}: {check.detail}",
                )
        for path in (work, *work.rglob("*")):  # temporary files are private; a bundle is not
            path.chmod(0o755 if path.is_dir() else 0o644)
        put_in_place(work, out)
        _failure_report(out).unlink(missing_ok=True)
        steps.update()
    except ParityError as error:
        stages = [report.document() for report in reports]
        write_json(_failure_report(out), {"stages": stages, "error": str(error)})
        raise ParityError(f"{error} The report is {_failure_report(out)}.", error.report) from None
    finally:
        steps.close()
        shutil.rmtree(work, ignore_errors=True)
    return reports


def check_arguments(
    out: Path, *, variants: Sequence[str], labelled: Sequence[Labelled], gates: Gates, replace: bool
) -> None:
    """Refuse what cannot be done before a checkpoint is loaded.

    Raises:
        InputError: ``out`` is taken, or an argument of :func:`build_bundle` makes no sense.
    """
    known = f"Choose from: {', '.join((*VARIANTS, *PACKAGES))}, or {AUTO} alone."
    asked = () if tuple(variants) == (AUTO,) else variants
    for variant in asked:
        if variant not in VARIANTS and variant not in PACKAGES:
            raise InputError(f"unknown variant {variant!r}. {known}")
    if not variants:
        raise InputError(f"no variants asked for. {known}")
    if asked and not any(variant in VARIANTS for variant in asked):
        raise InputError(
            "a bundle of CoreML packages alone runs on Apple's systems only. Add an ONNX variant, int8 say."
        )
    if len(set(variants)) < len(variants):
        raise InputError("a variant is asked for twice. Name each once; the last one is the default.")
    for variant, bound in gates.minimum_cosine.items():
        if variant not in VARIANTS and variant not in PACKAGES:
            raise InputError(f"a bound is given for {variant!r}, which is no variant. {known}")
        if not -1 <= bound <= 1:
            raise InputError(f"the bound {bound} for {variant} is no cosine. Give a number from -1 to 1.")
    if not 0 <= gates.maximum_drop <= 1:
        raise InputError(f"a maximum drop of {gates.maximum_drop} is no share. Give a number from 0 to 1.")
    if labelled and all(row.agent == OUT_OF_SCOPE for row in labelled):
        raise InputError("all labelled tasks are out of scope. Add tasks of the agents to calibrate on.")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: is a link or a file. Give a folder.")
    if out.exists() and not replace:
        raise InputError(f"{out}: exists already. Choose another folder, or give --force to replace a bundle.")
    if out.exists() and not (out / MANIFEST).exists():
        raise InputError(f"{out}: exists and is no bundle, so it is not replaced. Choose another folder.")


def _check(
    checkpoint: Checkpoint,
    agents: Sequence[Agent],
    labelled: Sequence[Labelled],
    like: Bundle | None,
    packages: Sequence[str],
) -> None:
    """Refuse what does not fit the checkpoint before anything takes time."""
    if packages:
        check_supported(checkpoint)
    names = tuple(agent.name for agent in agents)
    if checkpoint.head is not None and checkpoint.head.agents != names:
        raise CheckpointError(
            f"{checkpoint.folder}: the head was trained for {', '.join(checkpoint.head.agents)}; the agents given are "
            f"{', '.join(names)}. Give the agents file of its recipe or the bundle that it was adapted from, or "
            "delete head.safetensors to route by descriptions."
        )
    if like is not None and not labelled and _kind(checkpoint.head) != _kind(like.head):
        raise InputError(
            f"{like.path}: its confidence is calibrated for another kind of head than the checkpoint has. Calibrate "
            "anew with --eval."
        )


def _bounds(variant: str, gates: Gates) -> tuple[float, float]:
    """Lowest cosine on tasks, and elsewhere; a bound that is lowered lowers the other one with it."""
    known = VARIANTS.get(variant) or PACKAGES[variant]
    lowest = gates.minimum_cosine.get(variant, known.minimum_cosine)
    return lowest, min(known.elsewhere, lowest)


def _variant(reference: Reference, name: str, fp32: Path, work: Path, rows: list[list[int]], gates: Gates) -> Report:
    """Make a variant as small as its bound allows, or as precise as it can be if none meets it."""
    path = work / f"model.{name}.onnx"
    for keep in range(VARIANTS[name].keeps + 1):
        VARIANTS[name].make(fp32, path, keep, rows)
        report = reference.compare(run_graph(path), name, *_bounds(name, gates))
        if not report.failures:
            break
    return _with_size(report, path)


def _package(
    reference: Reference, name: str, checkpoint: Checkpoint, work: Path, identity: Identity, gates: Gates
) -> Report:
    """Convert to a CoreML package, and run what was saved in the evaluator, which needs no Mac."""
    package = PACKAGES[name]
    about = About(identity.name, identity.version, identity.licence, _AUTHOR, identity.base_model)
    made = convert(checkpoint, package.profile, work / f"{name}.mlpackage", about, package.compression)
    program = MilProgram(work / f"{name}.mlpackage")
    report = reference.compare(run_package(program), name, *_bounds(name, gates))
    report = judge_residency(report, program, LENGTHS[-1], package.profile.resident)
    return changed(report, bytes=made.bytes, seconds=made.seconds)


def _with_size(report: Report, path: Path) -> Report:
    return changed(report, bytes=path.stat().st_size + weights_path(path).stat().st_size)


def _failure_report(out: Path) -> Path:
    return out.with_name(f"{out.name}.{REPORT}")


def _refuse(reports: Sequence[Report]) -> None:
    """Raise ParityError if a stage failed."""
    failed = [report.stage for report in reports if report.failures]
    if failed:
        raise ParityError(
            f"{', '.join(failed)}: too far from the original. No bundle was written. Leave the variant out, or give "
            "another bound with --minimum-cosine or --maximum-drop.",
            table(reports),
        )


def _keep(
    work: Path, manifest: dict[str, Any], wanted: Sequence[str], packages: Sequence[str], reports: Sequence[Report]
) -> None:
    """Leave the wanted variants in the manifest, in their order, with what was measured, and delete the rest."""
    entry_of = {entry["id"]: entry for entry in manifest["variants"]}
    report_of = {report.stage: report for report in reports}
    manifest["variants"] = [
        entry_of[name] | {"parity": report_of[name].measurements()} for name in (*wanted, *packages)
    ]
    manifest["default_variant"] = wanted[-1]
    for name in VARIANTS:
        if name not in wanted:
            path = work / f"model.{name}.onnx"
            path.unlink(missing_ok=True)
            weights_path(path).unlink(missing_ok=True)


def _write_parts(folder: Path, checkpoint: Checkpoint, agents: Sequence[Agent]) -> None:
    """tokenizer.json, agents.json and goldens.json."""
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    head = checkpoint.head
    write_json(
        folder / "agents.json",
        {
            "agents": [asdict(agent) for agent in agents],
            "head": None
            if head is None
            else {
                "prototypes": _rounded(head.prototypes),
                "out_of_scope": _rounded(head.out_of_scope),
                "linear": None
                if head.linear is None
                else {"weight": _rounded(head.linear.weight), "bias": _rounded(head.linear.bias)},
            },
        },
    )
    goldens = []
    model = checkpoint.encoder().eval()
    texts = parity_texts("tasks")[:_GOLDENS]
    for text, ids in zip(texts, checkpoint.tokenize(texts), strict=True):
        with torch.no_grad():
            vector = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0]
        goldens.append({"text": text, "ids": ids, "vector": _rounded(vector)})
    write_json(folder / "goldens.json", {"goldens": goldens})


def _rounded(tensor: torch.Tensor) -> Any:
    """Values to 8 decimals: beyond fp32's precision for unit vectors, and short to read."""
    return np.round(tensor.detach().double().numpy(), 8).tolist()


def _manifest(
    folder: Path,
    checkpoint: Checkpoint,
    identity: Identity,
    variants: Sequence[str],
    reports: Sequence[Report],
    gates: Gates,
    generators: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    report_of = {report.stage: report for report in reports}
    uncalibrated = {strategy: calibration._asdict() for strategy, calibration in UNCALIBRATED.items()}
    return {
        "format": FORMAT,
        **asdict(identity),
        "encoder": {
            "dim": checkpoint.dim,
            "max_length": checkpoint.max_length,
            "pooling": "+".join(BUNDLE_POOLING.get(mode, mode) for mode in checkpoint.pooling),
            "normalised": True,
            "prompt": checkpoint.prompt,
        },
        "variants": [
            {
                "id": variant,
                **(
                    _graph_files(folder, variant)
                    if variant in VARIANTS
                    else _package_files(folder, variant, padding_of(checkpoint))
                ),
                "minimum_cosine": _bounds(variant, gates)[0],
                "calibrated_on": None,
                "calibration": {"trained": uncalibrated, "custom": uncalibrated},
                "parity": report_of[variant].measurements(),
            }
            for variant in variants
        ],
        "default_variant": "fp32",
        "generators": [
            entry | {key: listed(folder, entry[key]) for key in ("model", "weights")} for entry in generators
        ],
        "tokenizer": listed(folder, "tokenizer.json"),
        "agents": listed(folder, "agents.json"),
        "goldens": listed(folder, "goldens.json"),
        "documents": [],
        "tools": {name: importlib.metadata.version(name) for name in _TOOLS},
    }


def _graph_files(folder: Path, variant: str) -> dict[str, Any]:
    return {
        "runtime": "onnx",
        **listed(folder, f"model.{variant}.onnx"),
        "weights": listed(folder, f"model.{variant}.bin"),
        "precision": VARIANTS[variant].precision,
        "shapes": None,
        "compute_units": None,
        "minimum_os": None,
    }


def _package_files(folder: Path, variant: str, padding: int) -> dict[str, Any]:
    """A package is a folder; its program, its weights and its own list of files are listed each."""
    program = f"{variant}.mlpackage/Data/com.apple.CoreML"
    return {
        "runtime": "coreml",
        **listed(folder, f"{program}/model.mlmodel"),
        "weights": listed(folder, f"{program}/weights/weight.bin"),
        "package": listed(folder, f"{variant}.mlpackage/Manifest.json"),
        "precision": PACKAGES[variant].precision,
        "shapes": [[1, length] for length in LENGTHS],
        "compute_units": PACKAGES[variant].profile.compute_units,
        "minimum_os": MINIMUM_OS,
        "padding_id": padding,
    }


def _calibrate(
    folder: Path,
    entry: dict[str, Any],
    agents: Sequence[Agent],
    labelled: Sequence[Labelled],
) -> Routed:
    """Fit this variant's weights by routing the labelled tasks with the bundle itself.

    Returns:
        Where the embedding alone routes them.
    """
    bundle = Bundle.open(folder)
    names = [agent.name for agent in agents]
    fitted = {}
    # The bundle's agents taken as if they were a user's own show what descriptions alone can do.
    encoder = _encoder(bundle, bundle.variant(entry["id"]))
    signals: list[Signals] = []
    for kind, head in (("custom", None), ("trained", bundle.head)):
        router = Router(bundle.agents, UNCALIBRATED, encoder=encoder, head=head)
        signals = [router.signals(row.task) for row in labelled]
        fitted[kind] = calibrate(signals, labelled, names)
    entry["calibration"] = _calibrations({kind: fitted[kind] for kind in ("trained", "custom")})
    return Routed.of(signals, labelled, names)  # by the bundle's own head


def _encoder(bundle: Bundle, variant: Variant) -> Encoder:
    """The variant's encoder; a CoreML package runs in the evaluator."""
    if variant.runtime == "onnx":
        return Encoder.load(bundle, variant=variant.id, device="cpu", threads=1)
    package = bundle.path / f"{variant.id}.mlpackage"
    return Encoder(bundle, RunBackend(run_package(MilProgram(package))), lengths=variant.lengths)


def _kind(head: Head | ShippedHead | None) -> tuple[int, bool] | None:
    """Prototypes an agent, and whether a linear head decides; calibration depends on it."""
    return None if head is None else (head.prototypes.shape[1], head.linear is not None)


def _take_over(entry: dict[str, Any], like: Bundle) -> None:
    """The calibration of a bundle's variant of the same name, or of its default one."""
    variant = next((variant for variant in like.variants if variant.id == entry["id"]), like.variant())
    entry["calibration"] = _calibrations(variant.calibration)
    if variant.calibrated_on is not None:
        entry["calibrated_on"] = f"{variant.calibrated_on}, for {like.name} {like.version}"


def _calibrations(by_kind: Mapping[str, Mapping[str, Calibration]]) -> dict[str, Any]:
    return {
        kind: {
            strategy: {key: None if value is None else round(value, 5) for key, value in calibration._asdict().items()}
            for strategy, calibration in by_strategy.items()
        }
        for kind, by_strategy in by_kind.items()
    }


def listed(folder: Path, file: str) -> dict[str, Any]:
    """A file as the manifest lists it."""
    path = folder / file
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": file, "bytes": path.stat().st_size, "sha256": digest}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """``bundle.json`` and its digest."""
    content = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_DIGEST).write_bytes(manifest_digest(content))


def write_json(path: Path, value: Any) -> None:
    """JSON in one line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")


def put_in_place(work: Path, out: Path) -> None:
    """Move the finished folder to its name; an old one goes away only after the new one is whole."""
    if not out.exists():
        work.rename(out)
        return
    old = work.with_suffix(".old")
    out.rename(old)
    try:
        work.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
