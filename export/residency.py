"""What of a CoreML package can run on the Neural Engine, as far as its operations tell.

Core ML decides on the device, and only a Mac can say what it decided. What is counted here is what Apple's
"Deploying Transformers on the Apple Neural Engine" (2022) asks for, and what practice has shown to fall off it
(github.com/hollance/neural-engine, docs/unsupported-layers.md): lookups, whole numbers, float32, other ranks than
4, reshapes and transposes, sizes above 16384. Convolutions other than 1x1 the evaluator refuses to run.

The embedding is looked up on the CPU in any case, and the vector leaves by it. Hence the hot path, from the first
to the last product of matrices, is what is judged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from export.errors import ParityError
from export.mil import Arguments, Array, MilProgram, Operation
from export.parity import Report

LARGEST = 16384  # values along an axis


@dataclass(frozen=True, slots=True)
class Residency:
    """Counts of one package at one length.

    Attributes:
        package: Its name.
        tokens: The length.
        operations: By kind, those that depend on a shape alone left out: they are settled with the shape.
        hot: How many are in the hot path.
        against: By reason, how many in the hot path speak against the Neural Engine; an operation may have several.
        transposes: How many in the hot path only move values; each is a copy.
        elsewhere: By reason, the same before and behind the hot path.
        macs: Multiplications with addition in products of matrices.
        resident: How many of them are in a 1x1 convolution or a product of rank 4, in half precision.
    """

    package: str
    tokens: int
    operations: dict[str, int]
    hot: int
    against: dict[str, int]
    transposes: int
    elsewhere: dict[str, int]
    macs: int
    resident: int

    @property
    def share(self) -> float:
        """Share of the multiplications that can run on the Neural Engine."""
        return self.resident / self.macs if self.macs else 0.0

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self) | {"share": self.share}


@dataclass(frozen=True, slots=True)
class _Step:
    """An operation that was run: what speaks against it, and its multiplications."""

    kind: str
    reasons: tuple[str, ...]
    macs: int


def measure_residency(program: MilProgram, tokens: int) -> Residency:
    """Count at one of the lengths that a package takes.

    Raises:
        ToolchainError: The package does not take that length.
    """
    steps: list[_Step] = []

    def observe(operation: Operation, arguments: Arguments, results: Sequence[Array]) -> None:
        if operation.valued:
            product = _PRODUCTS.get(operation.kind)
            macs = product(arguments, results[0]) if product else 0
            steps.append(_Step(operation.kind, _reasons(operation, arguments, results), macs))

    program.run({name: np.ones((1, tokens), np.int32) for name in program.inputs}, "float32", observe)
    products = [i for i, step in enumerate(steps) if step.macs]
    first, last = (products[0], products[-1] + 1) if products else (0, 0)
    hot = steps[first:last]
    return Residency(
        package=program.path.name,
        tokens=tokens,
        operations=dict(Counter(step.kind for step in steps).most_common()),
        hot=len(hot),
        against=_count(hot),
        transposes=sum(step.kind == "transpose" for step in hot),
        elsewhere=_count(steps[:first] + steps[last:]),
        macs=sum(step.macs for step in steps),
        resident=sum(step.macs for step in steps if not step.reasons),
    )


def require_resident(residency: Residency, transposes: int, share: float = 1.0) -> None:
    """Raise ParityError unless a hot path is made for the Neural Engine.

    Args:
        residency: Of a package.
        transposes: How many the hot path may have: one a layer for the attention's keys.
        share: Least share of multiplications that can run there.
    """
    failures = [f"{count} operations of the hot path: {reason}" for reason, count in residency.against.items()]
    if residency.transposes > transposes:
        failures.append(f"{residency.transposes} transposes in the hot path, {transposes} allowed")
    if residency.share < share:
        failures.append(f"{residency.share:.1%} of the multiplications are in a resident form, below {share:.1%}")
    if failures:
        report = "\n".join(failures)
        raise ParityError(
            f"{residency.package}: would fall off the Neural Engine ({failures[0]}). Keep the layout of export/ane.py.",
            report,
        )


def judge_residency(report: Report, program: MilProgram, tokens: int, held: bool) -> Report:
    """A package's report with the share that can run on the Neural Engine.

    Args:
        report: Of the package.
        program: The package.
        tokens: One of the lengths that it takes.
        held: Whether what speaks against the Neural Engine is a failure.
    """
    residency = measure_residency(program, tokens)
    failures = report.failures
    if held:
        try:  # one transpose a layer, for the attention's keys; a layer has one activation, GELU or SiLU
            layers = sum(residency.operations.get(activation, 0) for activation in ("gelu", "silu"))
            require_resident(residency, transposes=layers)
        except ParityError as error:
            failures += (str(error),)
    return replace(report, resident=residency.share, failures=failures)


def _count(steps: Sequence[_Step]) -> dict[str, int]:
    return dict(Counter(reason for step in steps for reason in step.reasons).most_common())


def _reasons(operation: Operation, arguments: Arguments, results: Sequence[Array]) -> tuple[str, ...]:
    """What speaks against an operation."""
    arrays = [value for value in arguments.values() if isinstance(value, np.ndarray)]
    arrays += [one for one in arguments.get("values", []) if isinstance(one, np.ndarray)]
    data = [one for one in [arguments.get("x"), *arguments.get("values", []), *results] if isinstance(one, np.ndarray)]
    dtypes = {result.dtype for result in operation.results}
    tests = {
        "rank": any(value.ndim != 4 for value in data),
        "dtype": bool(dtypes - {"float16"}),
        "whole numbers": any("int" in dtype or dtype == "bool" for dtype in dtypes),
        "lookup": operation.kind == "gather",
        "reshape": operation.kind in ("reshape", "squeeze", "expand_dims"),
        "size": any(max(value.shape, default=0) > LARGEST for value in arrays + list(results)),
    }
    return tuple(reason for reason, applies in tests.items() if applies)


def _einsum_macs(a: Arguments, result: Array) -> int:
    del result
    labels = a["equation"].replace(" ", "").partition("->")[0].split(",")
    pairs = zip(labels, a["values"], strict=True)
    sizes = {label: int(n) for names, value in pairs for label, n in zip(names, value.shape, strict=True)}
    return math.prod(sizes.values())


# Multiplications of the operations that are products of matrices, by arguments and result.
_PRODUCTS: dict[str, Callable[[Arguments, Array], int]] = {
    "conv": lambda a, result: int(result.size) * math.prod(a["weight"].shape[1:]),
    "einsum": _einsum_macs,
    "linear": lambda a, result: int(result.size) * int(a["weight"].shape[1]),
    "matmul": lambda a, result: int(result.size) * int(a["x"].shape[-2 if a.get("transpose_x", False) else -1]),
}
