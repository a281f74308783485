"""``--variants auto``: measures the variants on this machine and keeps those that no other beats."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge.errors import MissingExtra
from edge.session import NOT_FUSED
from export.onnx import INPUTS
from export.parity import Report
from export.variants import VARIANTS

_TOKENS = 12
_ROUNDS = 60
CARD, PLOT = "CARD.md", "front.png"


@dataclass(frozen=True, slots=True)
class Measured:
    """A variant on this machine.

    Attributes:
        id: Of the variant.
        bytes: Size of graph and weights.
        milliseconds: Median time of one text of 12 tokens, one thread.
        ratio: The same relative to fp32, in the same run.
        cosine_min: Lowest cosine to fp32.
        cosine_mean: Mean cosine.
        nearest_agreement: Share of tasks whose nearest neighbour is fp32's.
        accuracy: Share of labelled tasks routed rightly; None without any.
    """

    id: str
    bytes: int
    milliseconds: float
    ratio: float
    cosine_min: float
    cosine_mean: float
    nearest_agreement: float
    accuracy: float | None


def measure(
    folder: Path, variants: Sequence[str], reports: Sequence[Report], rows: Sequence[list[int]]
) -> list[Measured]:
    """Time each variant that passed its gates beside fp32, in turn, so that a busy moment meets both alike."""
    stream = [token for row in rows for token in row]
    ids = np.array([stream[:_TOKENS]], dtype=np.int64)
    feed = dict(zip(INPUTS, (ids, np.ones_like(ids)), strict=True))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1

    def session(name: str) -> ort.InferenceSession:
        path = folder / f"model.{name}.onnx"
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=NOT_FUSED)

    def median(values: list[float]) -> float:
        return 1000 * statistics.median(values[_ROUNDS // 6 :])  # the first rounds warm up

    report_of = {report.stage: report for report in reports}
    first = session("fp32")
    measured = []
    for name in variants:
        pair = [first, session(name)]  # no more than two in memory
        times: list[list[float]] = [[], []]
        for _ in range(_ROUNDS):
            for of_one, one in zip(times, pair, strict=True):
                started = time.perf_counter()
                one.run(None, feed)
                of_one.append(time.perf_counter() - started)
        report = report_of[name]
        exact = name == "fp32"
        measured.append(
            Measured(
                name,
                report.bytes,
                median(times[1]),
                1.0 if exact else median(times[1]) / median(times[0]),
                1.0 if exact else report.cosine_min,
                1.0 if exact else report.cosine_mean,
                1.0 if exact else report.nearest_agreement,
                report.accuracy,
            )
        )
    return measured


def pareto(measured: Sequence[Measured]) -> tuple[str, ...]:
    """Ids of those that no other beats in size, time and mean cosine at once; the quickest comes last.

    Times within a tenth of each other count as equal: they are not measured more finely.
    """

    def beats(a: Measured, b: Measured) -> bool:
        no_worse = a.bytes <= b.bytes and a.ratio <= 1.1 * b.ratio and a.cosine_mean >= b.cosine_mean
        better = a.bytes < 0.99 * b.bytes or 1.1 * a.ratio < b.ratio or 1 - a.cosine_mean < 0.9 * (1 - b.cosine_mean)
        return no_worse and better

    front = [m for m in measured if not any(beats(other, m) for other in measured)]
    return tuple(m.id for m in sorted(front, key=lambda m: -m.ratio))


def write_card(
    folder: Path, name: str, measured: Sequence[Measured], kept: Sequence[str], reports: Sequence[Report]
) -> list[str]:
    """Write the table and the plot; returns the names of the files.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    lines = [
        f"# {name}: variants",
        "",
        f"Measured on {platform.system()} {platform.machine()}, ONNX Runtime {ort.__version__}, one thread, one text "
        f"of {_TOKENS} tokens, median of {_ROUNDS - _ROUNDS // 6}, each in turn with fp32. Cosines to fp32 over "
        f"{reports[-1].texts} tasks.",
        "",
        "| variant | kept | MB | ms | of fp32's time | cosine min | mean | nearest neighbour equal | accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in measured:
        accuracy = "-" if m.accuracy is None else f"{m.accuracy:.1%}"
        lines.append(
            f"| {m.id} | {'yes' if m.id in kept else 'beaten'} | {m.bytes / 1e6:.1f} | {m.milliseconds:.2f} | "
            f"{m.ratio:.2f} | {m.cosine_min:.4f} | {m.cosine_mean:.4f} | {m.nearest_agreement:.1%} | {accuracy} |"
        )
    lines += [f"| {r.stage} | refused: {'; '.join(r.failures)} | | | | | | | |" for r in reports if r.failures]
    lines += ["", f"![size against time]({PLOT})", ""]
    lines += [f"* {m.id}: {VARIANTS[m.id].precision}" for m in measured]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(folder / PLOT, measured, kept)
    return [CARD, PLOT]


def require_plots() -> None:
    """Raise MissingExtra now rather than after minutes of measuring, if plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("ruvltra-export bundle --variants auto", "bench") from None


def _plot(path: Path, measured: Sequence[Measured], kept: Sequence[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    loss = [max(1e-6, 1 - m.cosine_mean) for m in measured]
    points = axis.scatter(
        [m.bytes / 1e6 for m in measured],
        [m.milliseconds for m in measured],
        c=np.log10(loss),
        s=[90 if m.id in kept else 30 for m in measured],
        cmap="viridis_r",
    )
    for m in measured:
        axis.annotate(m.id, (m.bytes / 1e6, m.milliseconds), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="MB", ylabel="ms per text, 12 tokens, one thread", title="Variants: large points are kept")
    axis.set_xlim(0)
    axis.set_ylim(0)
    axis.grid(alpha=0.3)
    figure.colorbar(points, label="log10 of 1 - mean cosine to fp32")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
