"""Writes bundles: export, prove, calibrate, and only then put the folder in its place."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from tqdm import tqdm
from transformers import BertModel

from edge.agents import Agent
from edge.bundle import FORMAT, MANIFEST, MANIFEST_DIGEST, Bundle, Calibration, manifest_digest
from edge.bundle import Head as ShippedHead
from edge.doctor import examine
from edge.errors import InputError
from edge.evaluate import OUT_OF_SCOPE, Labelled
from edge.router import Router
from export.calibrate import UNCALIBRATED, calibrate
from export.checkpoint import Checkpoint, Head, load_checkpoint
from export.errors import CheckpointError, ParityError
from export.onnx import export_fp32, quantise_int8, weights_path
from export.parity import MINIMUM_COSINE, Reference, Report, Run, parity_texts
from export.wrapper import SentenceEncoder

VARIANTS = ("fp32", "int8")
_PRECISION = {
    "fp32": "float32 weights and activations",
    "int8": "int8 weights per channel, uint8 activations scaled per tensor at run time, int8 embedding rows",
}
_GOLDENS = 20
_MOST_KEPT = 3  # down-projections left in fp32 at most; further ones bring little for their bytes
_TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class Identity:
    """What the manifest says of a bundle's origin."""

    name: str
    version: str
    licence: str
    base_model: str


def build_bundle(
    checkpoint_folder: Path,
    out: Path,
    *,
    identity: Identity,
    agents: Sequence[Agent],
    variants: Sequence[str] = VARIANTS,
    labelled: Sequence[Labelled] = (),
    labelled_name: str | None = None,
    like: Bundle | None = None,
    minimum_cosine: dict[str, float] | None = None,
    replace: bool = False,
    quiet: bool = False,
) -> list[Report]:
    """Turn a checkpoint into a verified bundle.

    The bundle is put together in a temporary folder beside ``out`` and takes its place by one
    rename after every gate has passed, so that there is never half a bundle. Where an old one is
    replaced, it is moved aside first.

    Args:
        checkpoint_folder: Hugging Face or sentence-transformers folder.
        out: Where the bundle shall be.
        identity: Name, version, licence and base model for the manifest.
        agents: The agents to route to. If the checkpoint has a trained head, the same ones.
        variants: Which graphs to ship, of ``fp32`` and ``int8``; the last one is the default.
        labelled: Tasks to calibrate on; without any, confidences are marked as uncalibrated.
        labelled_name: What the manifest calls them.
        like: Where there are none, takes over the calibration of this bundle, from which the
            checkpoint was adapted.
        minimum_cosine: Bounds by variant, in place of ``MINIMUM_COSINE``.
        replace: Replace an existing ``out``.
        quiet: No progress on standard error.

    Returns:
        A parity report for each graph.

    Raises:
        ParityError: A graph misses its bound. Nothing was written.
        CheckpointError: The checkpoint cannot be used, or its head is of other agents.
        InputError: ``out`` exists, or an unknown variant was asked for.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise InputError(f"unknown variant {variant!r}. Choose from: {', '.join(VARIANTS)}.")
    bounds = MINIMUM_COSINE | (minimum_cosine or {})
    for variant in bounds:
        if variant not in VARIANTS:
            raise InputError(f"a bound is given for {variant!r}, which is no variant. Use: {', '.join(VARIANTS)}.")
    if labelled and all(row.agent == OUT_OF_SCOPE for row in labelled):
        raise InputError("all labelled tasks are out of scope. Add tasks of the agents to calibrate on.")
    if not variants:
        raise InputError("no variants asked for. Give at least one.")
    if out.exists() and not replace:
        raise InputError(f"{out}: exists already. Choose another folder, or give --force to replace a bundle.")
    if out.exists() and not (out / MANIFEST).exists():
        raise InputError(f"{out}: exists and is no bundle, so it is not replaced. Choose another folder.")
    steps = tqdm(total=3 + 3 * len(variants), disable=quiet, unit="step")
    steps.set_description("load checkpoint")
    checkpoint = load_checkpoint(checkpoint_folder)
    names = tuple(agent.name for agent in agents)
    if checkpoint.head is not None and checkpoint.head.agents != names:
        raise CheckpointError(
            f"{checkpoint_folder}: the head was trained for {', '.join(checkpoint.head.agents)}; the agents given are "
            f"{', '.join(names)}. Give the agents file of its recipe or the bundle that it was adapted from, or "
            "delete head.safetensors to route by descriptions."
        )
    if like is not None and not labelled and _kind(checkpoint.head) != _kind(like.head):
        raise InputError(
            f"{like.path}: its confidence is calibrated for another kind of head than the checkpoint has. Calibrate "
            "anew with --eval."
        )
    if not isinstance(checkpoint.backbone, BertModel):
        raise CheckpointError(f"{checkpoint_folder}: only BERT encoders can be exported. Distil it into one.")
    model = SentenceEncoder(checkpoint.backbone).eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        steps.update()
        steps.set_description("export fp32")
        fp32 = work / "model.fp32.onnx"
        export_fp32(model, fp32)
        steps.update()
        steps.set_description("run torch")
        reference = Reference(checkpoint, model)
        reports = []
        for variant in ("fp32", *(v for v in variants if v != "fp32")):
            path = work / f"model.{variant}.onnx"
            steps.set_description(f"parity {variant}")
            if variant == "fp32":
                reports.append(reference.compare(_runner(path), variant, bounds[variant]))
            else:
                reports.append(_quantise(reference, fp32, path, bounds[variant]))
            if variant in variants:
                steps.update(2)
        failed = [report for report in reports if report.failures]
        if failed:
            raise ParityError(
                f"{', '.join(r.variant for r in failed)}: too far from the original. Nothing was written; see the "
                "report.",
                "\n".join(report.table() for report in reports),
            )
        if "fp32" not in variants:
            fp32.unlink()
            weights_path(fp32).unlink()
        steps.set_description("goldens and calibration")
        _write_parts(work, checkpoint, model, agents)
        manifest = _manifest(work, checkpoint, identity, variants, reports, bounds)
        _write_manifest(work, manifest)
        for entry in manifest["variants"]:
            if labelled:
                _calibrate(work, entry, names, labelled)
                entry["calibrated_on"] = (
                    f"{labelled_name}, {len(labelled)} tasks" if labelled_name else str(len(labelled))
                )
            elif like is not None:
                _take_over(entry, like)
            steps.update()
        _write_manifest(work, manifest)
        steps.set_description("verify")
        for check in examine(work):
            if not check.ok:
                raise ParityError(
                    f"the finished bundle fails its own check. Nothing was written. {check.name}", check.detail
                )
        for path in (work, *work.iterdir()):  # temporary files are private; a bundle is not
            path.chmod(0o755 if path.is_dir() else 0o644)
        _put_in_place(work, out)
        steps.update()
    finally:
        steps.close()
        shutil.rmtree(work, ignore_errors=True)
    return reports


def _quantise(reference: Reference, fp32: Path, path: Path, bound: float) -> Report:
    """Make the smallest int8 graph that meets the bound, or the most precise one if none does."""
    for keep in range(_MOST_KEPT + 1):
        quantise_int8(fp32, path, keep)
        report = reference.compare(_runner(path), "int8", bound)
        if not report.failures:
            break
    return report


def _runner(path: Path) -> Run:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return result

    return run


def _write_parts(folder: Path, checkpoint: Checkpoint, model: SentenceEncoder, agents: Sequence[Agent]) -> None:
    """tokenizer.json, agents.json and goldens.json."""
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    head = checkpoint.head
    _write_json(
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
    texts = parity_texts("tasks")[:_GOLDENS]
    for text, ids in zip(texts, checkpoint.tokenize(texts), strict=True):
        with torch.no_grad():
            vector = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0]
        goldens.append({"text": text, "ids": ids, "vector": _rounded(vector)})
    _write_json(folder / "goldens.json", {"goldens": goldens})


def _rounded(tensor: torch.Tensor) -> Any:
    """Values to 8 decimals: beyond fp32's precision for unit vectors, and short to read."""
    return np.round(tensor.detach().double().numpy(), 8).tolist()


def _manifest(
    folder: Path,
    checkpoint: Checkpoint,
    identity: Identity,
    variants: Sequence[str],
    reports: Sequence[Report],
    bounds: dict[str, float],
) -> dict[str, Any]:
    report_of = {report.variant: report for report in reports}
    uncalibrated = {strategy: asdict(calibration) for strategy, calibration in UNCALIBRATED.items()}
    return {
        "format": FORMAT,
        **asdict(identity),
        "encoder": {
            "dim": checkpoint.dim,
            "max_length": checkpoint.max_length,
            "pooling": "mean",
            "normalised": True,
            "prompt": "",
        },
        "variants": [
            {
                "id": variant,
                "runtime": "onnx",
                **_listed(folder, f"model.{variant}.onnx"),
                "weights": _listed(folder, f"model.{variant}.bin"),
                "precision": _PRECISION[variant],
                "shapes": None,
                "compute_units": None,
                "minimum_os": None,
                "minimum_cosine": bounds[variant],
                "calibrated_on": None,
                "calibration": {"trained": uncalibrated, "custom": uncalibrated},
                "parity": report_of[variant].measurements(),
            }
            for variant in variants
        ],
        "default_variant": variants[-1],
        "tokenizer": _listed(folder, "tokenizer.json"),
        "agents": _listed(folder, "agents.json"),
        "goldens": _listed(folder, "goldens.json"),
        "tools": {name: importlib.metadata.version(name) for name in _TOOLS},
    }


def _calibrate(
    folder: Path,
    entry: dict[str, Any],
    names: Sequence[str],
    labelled: Sequence[Labelled],
) -> None:
    """Fit this variant's weights by routing the labelled tasks with the bundle itself."""
    bundle = Bundle.open(folder)
    fitted = {}
    # The bundle's agents taken as if they were a user's own show what descriptions alone can do.
    for kind, agents in (("trained", None), ("custom", list(bundle.agents))):
        router = Router.load(bundle, variant=entry["id"], agents=agents)
        signals = [router.signals(row.task) for row in labelled]
        fitted[kind] = calibrate(signals, labelled, names)
    entry["calibration"] = _calibrations(fitted)


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
            strategy: {key: None if value is None else round(value, 5) for key, value in asdict(calibration).items()}
            for strategy, calibration in by_strategy.items()
        }
        for kind, by_strategy in by_kind.items()
    }


def _listed(folder: Path, file: str) -> dict[str, Any]:
    data = (folder / file).read_bytes()
    return {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    content = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_DIGEST).write_bytes(manifest_digest(content))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def _put_in_place(work: Path, out: Path) -> None:
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
