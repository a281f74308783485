"""How right a router is on labelled tasks: accuracy with its interval, abstaining, calibration."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.agents import RESERVED
from edge.errors import InputError, MissingExtra
from edge.router import Decision, Router, Signals

OUT_OF_SCOPE = RESERVED  # label of a task that no agent should take
_BINS = 15


@dataclass(frozen=True, slots=True)
class Labelled:
    """A task and the name of the agent that should take it, or ``none``."""

    task: str
    agent: str


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share with its 95 % Wilson score interval (Wilson 1927); all None for n = 0."""

    hits: int
    n: int
    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, hits: int, n: int) -> Proportion:
        """``hits`` out of ``n``."""
        if n == 0:
            return cls(0, 0, None, None, None)
        z = 1.959964
        p = hits / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return cls(hits, n, p, max(0.0, centre - half), min(1.0, centre + half))

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return "-"
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True, slots=True)
class Score:
    """One strategy's result.

    Attributes:
        strategy: Its name.
        accuracy: In-scope tasks that went to the right agent; an abstention counts as wrong.
        top1: In-scope tasks whose right agent leads the ranking, abstained from or not.
        per_agent: Accuracy by true agent.
        confusions: (true, given, count), most frequent first; ``none`` for an abstention.
        abstain_precision: Share of abstentions that were out of scope.
        abstain_recall: Share of out-of-scope tasks that were abstained from.
        false_abstain: Share of in-scope tasks that were abstained from.
        auroc: Probability that a random in-scope task has a higher confidence than a random
            out-of-scope one; None without both kinds.
        ece: Expected calibration error of the confidence over 15 equal bins (Guo et al. 2017); an
            out-of-scope task counts as wrong.
        matrix: (true, given) -> count, ``none`` included.
    """

    strategy: str
    accuracy: Proportion
    top1: Proportion
    per_agent: dict[str, Proportion]
    confusions: list[tuple[str, str, int]]
    abstain_precision: Proportion
    abstain_recall: Proportion
    false_abstain: Proportion
    auroc: float | None
    ece: float
    matrix: dict[tuple[str, str], int]


def read_labelled(path: str | Path, agents: Iterable[str]) -> list[Labelled]:
    """Read rows ``{"task": ..., "agent": ...}`` from a JSON-lines file; other keys are passed over.

    Raises:
        InputError: The file is missing or empty, or a row is broken or names an unknown agent; the
            message names file and line.
    """
    path = Path(path)
    known = {*agents, OUT_OF_SCOPE}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Give a JSON-lines file of labelled tasks.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}). Check the file.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not valid JSON ({error}). Write one object a line.") from None
        task = row.get("task") if isinstance(row, dict) else None
        agent = row.get("agent") if isinstance(row, dict) else None
        if not isinstance(task, str) or not isinstance(agent, str):
            raise InputError(f'{path}:{number}: not a row {{"task": ..., "agent": ...}}. Correct the line.')
        if agent not in known:
            raise InputError(
                f"{path}:{number}: agent {agent!r} is not one of {', '.join(sorted(known))}. Correct the row, or load "
                "these agents with --agents."
            )
        rows.append(Labelled(task, agent))
    if not rows:
        raise InputError(f"{path}: no rows. Give a JSON-lines file of labelled tasks.")
    return rows


def evaluate(
    router: Router, rows: Sequence[Labelled], strategies: Sequence[str], signals: Iterable[Signals] | None = None
) -> list[Score]:
    """Score strategies on the same rows; each task is embedded once.

    Args:
        router: A router with an encoder, unless ``keyword`` alone is scored.
        rows: Labelled tasks.
        strategies: Which strategies to score.
        signals: The rows' signals, if they are at hand (or wrapped in a progress bar).
    """
    measured = [router.signals(row.task) for row in rows] if signals is None else list(signals)
    return [_score(strategy, rows, [router.decide(signal, strategy) for signal in measured]) for strategy in strategies]


def _score(strategy: str, rows: Sequence[Labelled], decisions: Sequence[Decision]) -> Score:
    pairs = list(zip(rows, decisions, strict=True))
    inside = [(row, d) for row, d in pairs if row.agent != OUT_OF_SCOPE]
    outside = [d for row, d in pairs if row.agent == OUT_OF_SCOPE]
    matrix = Counter((row.agent, d.agent or OUT_OF_SCOPE) for row, d in pairs)
    abstained_inside = sum(d.agent is None for _, d in inside)
    abstained_outside = sum(d.agent is None for d in outside)
    names = sorted({row.agent for row, _ in inside})
    wrong = Counter({key: count for key, count in matrix.items() if key[0] != key[1]})
    return Score(
        strategy=strategy,
        accuracy=Proportion.of(sum(d.agent == row.agent for row, d in inside), len(inside)),
        top1=Proportion.of(sum(d.ranking[0].id == row.agent for row, d in inside), len(inside)),
        per_agent={
            name: Proportion.of(matrix[name, name], sum(row.agent == name for row, _ in inside)) for name in names
        },
        confusions=[
            (true, given, count) for (true, given), count in sorted(wrong.items(), key=lambda i: (-i[1], i[0]))
        ],
        abstain_precision=Proportion.of(abstained_outside, abstained_inside + abstained_outside),
        abstain_recall=Proportion.of(abstained_outside, len(outside)),
        false_abstain=Proportion.of(abstained_inside, len(inside)),
        auroc=auroc([d.confidence for _, d in inside], [d.confidence for d in outside]),
        ece=calibration_error([(d.confidence, d.ranking[0].id == row.agent) for row, d in pairs]),
        matrix=dict(matrix),
    )


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Area under the ROC curve by ranks (Mann-Whitney U); ties count half."""
    if not positive or not negative:
        return None
    ordered = sorted([(value, 1) for value in positive] + [(value, 0) for value in negative])
    rank_sum, start = 0.0, 0
    while start < len(ordered):
        end = start
        while end < len(ordered) and ordered[end][0] == ordered[start][0]:
            end += 1
        rank_sum += (start + end + 1) / 2 * sum(kind for _, kind in ordered[start:end])
        start = end
    return (rank_sum - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative))


def calibration_error(outcomes: Sequence[tuple[float, bool]]) -> float:
    """Expected calibration error of (confidence, right) pairs over 15 bins of equal width."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in outcomes:
        bins.setdefault(min(int(confidence * _BINS), _BINS - 1), []).append((confidence, right))
    gaps = (abs(sum(c for c, _ in members) - sum(r for _, r in members)) for members in bins.values())
    return sum(gaps) / max(1, len(outcomes))


def plot_confusion(score: Score, path: Path, title: str) -> None:
    """Draw a strategy's confusion matrix as a PNG: true agents down, given ones across.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("--plot", "bench") from None
    names = sorted({name for key in score.matrix for name in key} - {OUT_OF_SCOPE})
    names.append(OUT_OF_SCOPE)
    counts = [[score.matrix.get((true, given), 0) for given in names] for true in names]
    totals = [max(1, sum(row)) for row in counts]
    shares = [[count / total for count in row] for row, total in zip(counts, totals, strict=True)]
    size = 2.5 + 0.5 * len(names)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                axis.text(j, i, str(count), ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black")
    names_shown = [name.replace("$", r"\$") for name in names]  # a dollar would start a formula
    labels = [name if name != OUT_OF_SCOPE else "none / abstains" for name in names_shown]
    axis.set_xticks(range(len(names)), labels, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), labels)
    axis.set(
        xlabel="given",
        ylabel="true",
        title=f"{title.replace('$', chr(92) + '$')}\n{score.strategy}: {score.accuracy}, n = {score.accuracy.n}",
    )
    figure.colorbar(image, ax=axis, label="share of the true agent's tasks", shrink=0.8)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Choose another path for --plot.") from None
