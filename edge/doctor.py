"""Proves a bundle on this device: hashes, token ids, vectors and stability, recomputed here; and says how it runs."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import tokenizers

from edge.bundle import Bundle, Variant
from edge.choice import make_backend
from edge.coreml import available
from edge.device import detect
from edge.encoder import Encoder
from edge.errors import EdgeError, MissingExtra
from edge.providers import Candidate, installed
from edge.router import Router
from edge.trial import run_trial
from edge.tune import kept

_TASK = "Fix the null pointer in the login handler"
# All of them bring the module onnxruntime, and the one that was installed last has overwritten files of the others.
_RIVALS = (
    "onnxruntime onnxruntime-gpu onnxruntime-openvino onnxruntime-directml onnxruntime-webgpu onnxruntime-migraphx "
    "onnxruntime-rocm onnxruntime-cann onnxruntime-silicon onnxruntime-coreml"
).split()
# From the first on, and below the second: what the tests have run with, as pyproject.toml states it.
TESTED = {"numpy": ("2.0", "2.5"), "onnxruntime": ("1.24", "1.33"), "tokenizers": ("0.22", "0.24")}
_LONGEST = 2048  # words; attention over more takes gigabytes


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked, whether it holds, and the figure or reason."""

    name: str
    ok: bool
    detail: str


def examine(path: str | Path | None = None) -> Iterator[Check]:
    """Check a bundle step by step; stops where nothing further can be said.

    Args:
        path: Folder or zip file; None for the bundle that comes with the package.
    """
    try:
        bundle = Bundle.open(path)
    except EdgeError as error:
        yield Check("files", False, str(error))
        return
    yield Check(
        "files", True, f"{bundle.name} {bundle.version}: manifest, tokenizer, agents and goldens match their sha256"
    )
    for file in (f for g in bundle.generators for f in (g.model, g.weights)):
        try:
            bundle.locate(file)
        except EdgeError as error:
            yield Check(f"file {file.file}", False, str(error))
    sound = True
    for variant in bundle.variants:
        if variant.runtime == "onnx" or (variant.runtime == "coreml" and available()):
            for check in _examine_variant(bundle, variant):
                sound = sound and check.ok
                yield check
        else:
            yield _examine_files(bundle, variant)
            needed = variant.id == bundle.default_variant
            yield Check(f"{variant.id}: skipped", not needed, f"runtime {variant.runtime} does not run here")
    if bundle.catalogue is not None and sound:
        yield _examine_catalogue(bundle)


def _examine_catalogue(bundle: Bundle) -> Check:
    from edge.capabilities import Capabilities

    try:
        catalogue = Capabilities.load(bundle)
        (best,) = catalogue.search(_TASK, k=1)
    except EdgeError as error:
        return Check("capabilities", False, str(error))
    return Check("capabilities", True, f"{len(catalogue)} load, and a request is answered: {best.id}")


def _examine_files(bundle: Bundle, variant: Variant) -> Check:
    try:
        for file in variant.files:
            bundle.locate(file)
    except EdgeError as error:
        return Check(f"{variant.id}: files", False, str(error))
    return Check(f"{variant.id}: files", True, f"{variant.bytes / 1e6:.1f} MB match their sha256")


def _examine_variant(bundle: Bundle, variant: Variant) -> Iterator[Check]:
    try:
        provider = "cpu" if variant.runtime == "onnx" else "coreml"
        candidate = Candidate(variant.id, provider)
        encoder = Encoder(bundle, make_backend(bundle, variant, candidate), lengths=variant.lengths)
        yield Check(f"{variant.id}: model", True, f"{variant.model.file}, {variant.bytes / 1e6:.1f} MB, loads")
        goldens = bundle.goldens()
        if not goldens:
            yield Check(f"{variant.id}: goldens", False, "the bundle has none, so nothing can be proven")
            return
        wrong = [golden.text for golden in goldens if encoder.tokenize(golden.text).ids != golden.ids]
        detail = f"token ids of {len(goldens)} goldens are equal"
        yield Check(f"{variant.id}: tokens", not wrong, f"token ids differ for {wrong[0]!r}" if wrong else detail)
        texts = [golden.text for golden in goldens]
        vectors = encoder.encode(texts)
        cosines = [float(v @ golden.vector) for v, golden in zip(vectors, goldens, strict=True)]
        lowest = min(cosines)
        yield Check(
            f"{variant.id}: vectors",
            lowest >= variant.minimum_cosine,
            f"cosine to fp32 goldens: min {lowest:.5f}, mean {np.mean(cosines):.5f}, bound {variant.minimum_cosine}",
        )
        long = encoder.tokenize("word " * min(encoder.max_length, _LONGEST))
        encoder.encode_tokens(long)
        detail = f"a text of {len(long.ids)} tokens runs, {encoder.max_length} are allowed"
        yield Check(f"{variant.id}: length", True, detail)
        again = encoder.encode(texts[::-1])[::-1]
        yield Check(f"{variant.id}: order", np.array_equal(vectors, again), "vectors do not depend on order or company")
        kind = "custom" if bundle.head is None else "trained"
        router = Router(bundle.agents, dict(variant.calibration[kind]), encoder=encoder, head=bundle.head)
        decision = router.route(_TASK)
        answer = f"{decision.agent or 'nobody'} at confidence {decision.confidence:.2f}"
        yield Check(f"{variant.id}: route", bool(np.isfinite(decision.confidence)), f"a task is routed: {answer}")
    except EdgeError as error:
        yield Check(f"{variant.id}: failed", False, str(error))


def examine_device(path: str | Path | None = None) -> Iterator[Check]:
    """Say how a bundle runs here: what was chosen and why, what is installed and not used, versions, time and memory.

    Args:
        path: As for :func:`examine`, which should have found nothing wrong.
    """
    device = detect()
    cores = f"{device.threads} of {device.logical_cores} cores to use"
    yield Check("device", True, f"{device.cpu}, {cores}, {', '.join(device.features) or 'no int8 instructions known'}")
    yield from _versions()
    yield _index()
    bundle = Bundle.open(path)
    with warnings.catch_warnings(record=True) as dropped:
        warnings.simplefilter("always")
        try:
            encoder = Encoder.load(bundle)
        except EdgeError as error:
            yield Check("placement", False, str(error))
            return
    for warning in dropped:
        yield Check("dropped", False, str(warning.message))
    assert encoder.placement is not None
    chosen = encoder.placement.candidate
    yield Check("placement", True, str(encoder.placement))
    yield from _unused(bundle, chosen)
    trial = run_trial(bundle.path, chosen, seconds=0.2, batches=[1])
    if trial.failure is not None or trial.load is None:
        yield Check("time", False, f"{chosen}: {trial.failure}")
        return
    started = time.perf_counter()
    command = [sys.executable, "-m", "edge.cli", "route", "--bundle", str(bundle.path), _TASK]
    done = subprocess.run(command, capture_output=True, check=False)
    cold = time.perf_counter() - started
    detail = f"{cold:.2f} s from the start of a process to its first decision; the model loads in {trial.load:.3f} s"
    yield Check("time, cold", done.returncode in (0, 3), detail)
    warm = ", ".join(f"{t.p50:.2f} ms for {t.tokens} tokens" for t in trial.timings if t.batch == 1)
    yield Check("time, warm", True, f"a text takes {warm} (median)")
    if trial.rss is not None:
        yield Check("memory", True, f"a process that embeds takes {trial.rss / 1e6:.0f} MB at most")


def _versions() -> Iterator[Check]:
    from importlib import metadata

    here = []
    for name in _RIVALS:
        try:
            here.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    said = ", ".join(here) or f"onnxruntime {ort.__version__}, installed by other means than pip"
    if len(here) > 1:
        said += ": they overwrite each other's files; uninstall all, then install one"
    yield Check("onnxruntime", len(here) < 2, said)
    versions = {"numpy": np.__version__, "onnxruntime": ort.__version__, "tokenizers": tokenizers.__version__}
    untested = [
        f"{name} {version} (tested: {' to below '.join(TESTED[name])})"
        for name, version in versions.items()
        if not _numbers(TESTED[name][0]) <= _numbers(version) < _numbers(TESTED[name][1])
    ]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Check("versions", True, f"not tested with {', '.join(untested)}" if untested else f"tested: {said}")


def _index() -> Check:
    """Whether Annoy finds here what exact search finds; some compilers' fast-math has broken it."""
    from edge import trees

    random = np.random.default_rng(0)
    vectors = np.repeat(random.normal(size=(30, 32)), 20, axis=0) + 0.3 * random.normal(size=(600, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    try:
        built = trees.build(vectors, trees.TREES, seed=0)
    except MissingExtra as error:
        return Check("index", True, f"all vectors are searched exactly; {error}")
    problem = trees.fault(built, vectors)
    if problem is not None:
        return Check("index", False, f"Annoy's search is broken: {problem}. Compile it here, or uninstall it")
    found = 0
    for query in vectors[::20]:
        rows = built.candidates(vectors, query, 10, 200)
        best = set(rows[np.argsort(-(vectors[rows] @ query))[:10]].tolist())
        found += len(best & set(np.argsort(-(vectors @ query))[:10].tolist()))
    return Check("index", found >= 285, f"Annoy finds {found / 300:.1%} of the nearest of 600 vectors (bound 95 %)")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _unused(bundle: Bundle, chosen: Candidate) -> Iterator[Check]:
    """Each installed provider that was not chosen, and why."""
    tuning = kept(bundle)
    for row in installed():
        if row.name == chosen.provider:
            continue
        trials = [] if tuning is None else [t for t in tuning.trials if t.candidate.provider == row.name]
        good = [t for t in trials if t.failure is None and t.timings]
        if row.unusable is not None:
            why = row.unusable
        elif not trials:
            why = "not measured here; ruvltra tune does"
        elif good:
            best = min(good, key=lambda t: t.p50(12, 1))
            why = f"its best takes {best.p50(12, 1):.2f} ms for 12 tokens ({best.candidate}); another one won"
        else:
            why = f"fails: {trials[0].failure}"
        yield Check(f"not used: {row.name}", True, f"{row.source}; {why}")
