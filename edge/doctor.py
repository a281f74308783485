"""Proves a bundle on this device: hashes, token ids, vectors and stability, recomputed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.bundle import Bundle, Variant
from edge.coreml import available
from edge.encoder import Encoder
from edge.errors import EdgeError
from edge.router import Router

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
    for variant in bundle.variants:
        if variant.runtime == "onnx" or (variant.runtime == "coreml" and available()):
            yield from _examine_variant(bundle, variant)
        else:
            yield _examine_files(bundle, variant)
            needed = variant.id == bundle.default_variant
            yield Check(f"{variant.id}: skipped", not needed, f"runtime {variant.runtime} does not run here")


def _examine_files(bundle: Bundle, variant: Variant) -> Check:
    try:
        for file in variant.files:
            bundle.locate(file)
    except EdgeError as error:
        return Check(f"{variant.id}: files", False, str(error))
    return Check(f"{variant.id}: files", True, f"{variant.bytes / 1e6:.1f} MB match their sha256")


def _examine_variant(bundle: Bundle, variant: Variant) -> Iterator[Check]:
    try:
        encoder = Encoder.load(bundle, variant=variant.id)
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
        router = Router.load(bundle, variant=variant.id)
        decision = router.route("Fix the null pointer in the login handler")
        answer = f"{decision.agent or 'nobody'} at confidence {decision.confidence:.2f}"
        yield Check(f"{variant.id}: route", bool(np.isfinite(decision.confidence)), f"a task is routed: {answer}")
    except EdgeError as error:
        yield Check(f"{variant.id}: failed", False, str(error))
