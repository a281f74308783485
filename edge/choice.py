"""Which way to run a bundle on this device, and why: by what `ruvltra tune` measured, else by a table.

Whatever is chosen is proven before it is used: anything but ONNX Runtime's CPU provider in a process of its own
first, which may crash or hang, and all of it by a golden vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from edge.bundle import Bundle, Variant
from edge.device import INT8_FEATURES, cache_folder, cpu_features, has_battery, usable_cores
from edge.errors import (
    BackendError,
    EdgeError,
    EdgeWarning,
    InputError,
    OutputError,
    PlacementError,
    ProviderUnavailable,
)
from edge.providers import KNOWN, Candidate, Provider
from edge.session import MAX_THREADS, Backend, OnnxBackend, Placement

USES = ("latency", "throughput", "memory")
TUNING = "tuning.json"  # in the cache folder: what `ruvltra tune` measured
_HALF_PRECISION = 0.999
LIMIT = 120.0  # seconds for a candidate's trial; a provider that compiles may take most of it


class Choice(NamedTuple):
    """A candidate, and why it comes where it does."""

    candidate: Candidate
    reason: str


class Wish(NamedTuple):
    """What a caller asked for.

    Attributes:
        variant: Id of a variant; None leaves it open.
        device: ``auto``, a provider's name, or one with options.
        threads: For one text; None leaves it open.
        strict: All of the graph must run on the provider.
        use: Of ``USES``; what a measured winner is to be best at.
    """

    variant: str | None = None
    device: str | Provider = "auto"
    threads: int | None = None
    strict: bool = False
    use: str = "latency"

    def check(self) -> None:
        """Raise InputError or BackendError where it makes no sense."""
        if self.use not in USES:
            raise InputError(f"unknown use {self.use!r}. Use one of: {', '.join(USES)}.")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise BackendError(f"threads must be 1 to {MAX_THREADS}, not {self.threads}. Leave it out for the default.")


def open_backend(bundle: Bundle, wish: Wish) -> tuple[Backend, Variant, Placement]:
    """The back end that fits best, loaded and proven; with ``auto`` what fails is dropped with a warning.

    Raises:
        BundleError: The bundle cannot be used.
        InputError: A device or use that does not exist.
        BackendError: What was asked for does not run, or nothing does.
    """
    wish.check()
    last: BackendError | None = None
    for choice in _choices(bundle, wish):
        if last is not None:
            warnings.warn(f"{last} Until then: {choice.candidate}.", EdgeWarning, stacklevel=4)
        try:
            return _open(bundle, choice, wish)
        except BackendError as error:
            if wish.device != "auto":
                raise
            last = error
    assert last is not None
    raise last


def hash_ahead(bundle: Bundle, wish: Wish) -> None:
    """Begin to hash the weights that will most likely be used, while other things load."""
    if wish.device in ("auto", "cpu"):
        weights = bundle.variant(next(policy(bundle, wish)).candidate.variant).weights
        if weights is not None:
            bundle.hash_ahead(weights)


def _open(bundle: Bundle, choice: Choice, wish: Wish) -> tuple[Backend, Variant, Placement]:
    candidate = choice.candidate
    variant = bundle.variant(candidate.variant)
    if candidate.provider != "cpu" and variant.runtime == "onnx":
        from edge.tune import prove  # starts processes, which the default never does

        prove(bundle, candidate)
    backend = make_backend(bundle, variant, candidate)
    check_golden(backend, variant, bundle, golden_bound(variant, candidate))
    nodes = backend.nodes() if isinstance(backend, OnnxBackend) else {}
    placement = Placement(candidate, choice.reason, nodes)
    if wish.strict:
        check_placement(placement)
    return backend, variant, placement


def make_backend(bundle: Bundle, variant: Variant, candidate: Candidate) -> Backend:
    """Load a candidate.

    Raises:
        BundleError: A file of the bundle cannot be used.
        BackendError: It does not load.
    """
    if variant.runtime == "coreml":
        from edge.coreml import CoreMLBackend  # what it needs, other devices need not load

        return CoreMLBackend(bundle, variant, device="cpu" if candidate.provider == "cpu" else "auto")
    if candidate.provider not in KNOWN:
        from edge.providers import backend_factory

        try:
            factory = backend_factory(candidate.provider)
            if factory is not None:
                return factory(bundle, variant, candidate)
        except EdgeError:
            raise
        except Exception as error:  # of another package, which may raise anything
            raise BackendError(
                f"{candidate.provider}: {type(error).__name__}: {error}. Use another device, or mend that package."
            ) from error
    return OnnxBackend(bundle, variant, candidate)


def golden_bound(variant: Variant, candidate: Candidate) -> float:
    """Lowest cosine to a golden: the variant's; on anything but the CPU no more than half precision allows.

    Providers compute fp32 products in bfloat16 or TF32 where the hardware has them.
    """
    return variant.minimum_cosine if candidate.provider == "cpu" else min(variant.minimum_cosine, _HALF_PRECISION)


def check_golden(backend: Backend, variant: Variant, bundle: Bundle, bound: float) -> None:
    """Run the first golden.

    Raises:
        OutputError: Its vector is not the one that the bundle states, within a bound on the cosine.
    """
    goldens = bundle.goldens(1)
    if not goldens:
        return
    golden = goldens[0]
    ids = np.array([golden.ids], dtype=np.int64)
    cosine = float(backend.run(ids, np.ones_like(ids))[0] @ golden.vector)
    if not cosine >= bound:
        raise OutputError(
            f"{variant.id}: the vector of {golden.text!r} has a cosine of {cosine:.7f} to the golden one, the bound is "
            f"{bound}. Use another variant or device; ruvltra tune finds one that is right."
        )


def check_placement(placement: Placement) -> None:
    """Raise PlacementError unless all operations run on the candidate's provider, and that is known."""
    candidate = placement.candidate
    if not placement.nodes:
        raise PlacementError(f"{candidate}: does not say where its operations run. Leave strict out.")
    if placement.share != 1:
        where = ", ".join(f"{count} on {provider}" for provider, count in placement.nodes.items())
        raise PlacementError(
            f"{candidate}: not all of its operations run there, but {where}. Use another variant or device, or leave "
            "strict out."
        )


def _choices(bundle: Bundle, wish: Wish) -> Iterator[Choice]:
    """Candidates in the order in which they are to be tried."""
    if wish.device != "auto":
        yield _explicit(bundle, wish)
        return
    measured = None
    if (cache_folder() / TUNING).is_file():
        from edge.tune import winner  # slow to import, as it starts processes

        measured = winner(bundle, wish.use)
    if measured is not None and wish.variant in (None, measured.candidate.variant):
        threads = wish.threads or measured.candidate.threads
        yield Choice(measured.candidate._replace(threads=threads), measured.reason)
    yield from policy(bundle, wish)


def policy(bundle: Bundle, wish: Wish) -> Iterator[Choice]:
    """What is best without having measured: the CPU, and on it the best variant for its instructions.

    Other providers are never taken unmeasured: a text runs by itself, and for one short text through a small
    transformer, handing it over to a GPU or NPU costs more than it saves as often as not.
    """
    if wish.variant is not None:
        variant = bundle.variant(wish.variant)
        provider = "cpu" if variant.runtime == "onnx" else "coreml"
        yield Choice(_on_cpu(variant, wish, provider), "the variant that was asked for")
        return
    variants = [variant for variant in bundle.variants if variant.runtime == "onnx"]
    if not variants:
        raise ProviderUnavailable(f"{bundle.path}: has no variant that runs here. Export it with an onnx variant.")
    dot = sorted(INT8_FEATURES.intersection(cpu_features()))
    # For the CPU: quicker than half precision and fp32 on any of the CPUs measured, with such instructions or without.
    order = {"int8": 0, "int8-static": 1, "int8-weights": 2, "fp32": 3}
    fast = f"{', '.join(dot)} multiplies int8" if dot else "less to read than fp32"
    default = bundle.variant(bundle.default_variant)
    for variant in sorted(variants, key=lambda v: (not _is_int8(v), v is not default, order.get(v.id, 9))):
        why = f"int8 on the CPU: {fast}" if _is_int8(variant) else "no int8 variant is left"
        yield Choice(_on_cpu(variant, wish), f"{why}; not measured here (ruvltra tune does)")


def _explicit(bundle: Bundle, wish: Wish) -> Choice:
    asked = wish.device if isinstance(wish.device, Provider) else Provider(wish.device)
    name, _, hardware = asked.name.partition(":")
    reason = "the device that was asked for"
    if name in ("cpu", KNOWN["cpu"].provider):
        if asked.options:
            raise InputError("the CPU takes no options. Leave them out.")
        candidate = next(policy(bundle, wish)).candidate
        return Choice(candidate._replace(provider="cpu"), reason)
    packages = [v for v in bundle.variants if v.runtime == "coreml" and wish.variant in (None, v.id)]
    if name == "coreml" and packages and not asked.options:
        return Choice(_on_cpu(packages[0], wish, "coreml"), reason)
    from edge.providers import find, installed, options_of
    from edge.tune import cache_of

    row = find(name, installed())
    options = options_of(row, str(cache_of(row.name))) if asked.options is None else dict(asked.options)
    if hardware and row.package is None:
        if row.name != "openvino":
            raise InputError(f"{row.name} takes no kind of hardware. Leave {':' + hardware!r} out; see its options.")
        options, hardware = options | {"device_type": hardware.upper()}, ""
    if wish.variant is not None:
        variant = bundle.variant(wish.variant)
    else:
        # Graphs quantised for the CPU hold its own operators, which other providers mostly lack.
        variants = [v for v in bundle.variants if v.runtime == "onnx"]
        variant = min(variants, key=_is_int8)
    candidate = Candidate(variant.id, row.name, options, hardware.upper(), wish.threads or usable_cores())
    return Choice(candidate, reason)


def _on_cpu(variant: Variant, wish: Wish, provider: str = "cpu") -> Candidate:
    """One thread for a text, unless more were asked for.

    Several are of use only where they spin, which takes energy and loses much beside other work.
    """
    threads = 1 if wish.threads is None else wish.threads
    return Candidate(variant.id, provider, threads=threads, spinning=threads > 1 and not has_battery())


def side_by_side(candidate: Candidate) -> int:
    """How many texts run at the same time: one a core, where a text takes one thread of the CPU."""
    return usable_cores() if candidate.provider == "cpu" and candidate.threads == 1 else 1


def _is_int8(variant: Variant) -> bool:
    return "int8 activations" in variant.precision
