"""Fits the weights by which a router turns signals into probabilities, and its thresholds.

Multinomial logistic regression with weights shared by all agents (four numbers), fitted by
Newton's method on a labelled file that the encoder was not trained on. With the cosine alone it
is temperature scaling (Guo et al. 2017, arXiv:1706.04599).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.bundle import Calibration
from edge.evaluate import OUT_OF_SCOPE, Labelled
from edge.router import Signals, probabilities

# Which of (cosine, matched, first) each strategy may use.
_FEATURES = {"keyword": (1, 2), "embedding": (0,), "hybrid": (0, 1, 2)}
# Used where there is no labelled data: rough values for a cosine-trained encoder, no abstaining.
UNCALIBRATED = {
    "keyword": Calibration(0.0, 1.0, 2.0, None, 0.0),
    "embedding": Calibration(14.0, 0.0, 0.0, None, 0.0),
    "hybrid": Calibration(14.0, 0.5, 0.5, None, 0.0),
}
_RIDGE = 1e-3
_LOST = 0.03  # share of in-scope tasks that abstaining may cost at most


def calibrate(signals: Sequence[Signals], rows: Sequence[Labelled], agents: Sequence[str]) -> dict[str, Calibration]:
    """Fit every strategy.

    The threshold is where the shares of out-of-scope tasks caught and of in-scope tasks kept add up
    to most (Youden's index, 1950), with at least 97 % kept; the lowest one where several do.

    With a trained head ``hybrid`` is ``embedding`` where keywords bring no accuracy. Keywords of
    agents that nobody trained were chosen by their owner and always count.

    Args:
        signals: Of each row, by the very variant that is calibrated.
        rows: The labelled tasks; ``none`` marks those out of scope.
        agents: Names in the router's order.

    Returns:
        By strategy: ``keyword``, ``embedding`` and ``hybrid``.
    """
    position = {name: i for i, name in enumerate([*agents, OUT_OF_SCOPE])}
    label = np.array([position[row.agent] for row in rows])
    inside = label < len(agents)
    trained = signals[0].out_of_scope is not None
    features = np.stack([_features(signal) for signal in signals])  # (n, agents + 1, 4)
    with_rest = bool((~inside).any())
    if not with_rest:
        features = features[:, :-1]
    result: dict[str, Calibration] = {}
    for strategy, used in _FEATURES.items():
        weights = fit(features, label, [*used, 3] if with_rest else list(used), signed=(3,))
        rest = float(weights[3]) if with_rest else None
        fitted = Calibration(float(weights[0]), float(weights[1]), float(weights[2]), rest, 0.0)
        if strategy == "hybrid" and trained:
            fitted = _earned(fitted, result["embedding"], signals, label)
        confidence = np.array([probabilities(signal, fitted).max() for signal in signals])
        threshold = 0.0
        if with_rest and strategy != "keyword":
            threshold = _threshold(confidence[inside], confidence[~inside])
        result[strategy] = fitted._replace(threshold=round(threshold, 4))
    return result


def calibrate_likelihoods(
    likelihoods: NDArray[np.float64], empty: NDArray[np.float64], rows: Sequence[Labelled], agents: Sequence[str]
) -> tuple[float, Calibration]:
    """Fit how a language model's likelihoods of the agents' names become probabilities.

    What it says of no task at all is taken off, by a weight of its own: some names are likely whatever the task
    (contextual calibration, Zhao et al. 2021, arXiv:2102.09690).

    Args:
        likelihoods: (tasks, agents) logarithms, of each row's task.
        empty: (agents,) the same of an empty task.
        rows: The labelled tasks; ``none`` marks those out of scope.
        agents: Names in the router's order.

    Returns:
        The weight of ``empty`` beside a task's likelihood of weight 1, and the calibration; its ``cosine`` is the
        weight of their sum.
    """
    position = {name: i for i, name in enumerate([*agents, OUT_OF_SCOPE])}
    label = np.array([position[row.agent] for row in rows])
    inside = label < len(agents)
    features = np.zeros((len(rows), len(agents) + 1, 3))
    features[:, :-1, 0], features[:, :-1, 1], features[:, -1, 2] = likelihoods, empty, 1
    with_rest = bool((~inside).any())
    if not with_rest:
        features = features[:, :-1]
    scale = max(float(np.abs(features[:, :, :2]).mean()), 1e-9)  # Newton's steps are for features of about this size
    features[:, :, :2] /= scale
    weights = fit(features, label, [0, 1, 2] if with_rest else [0, 1], signed=(1, 2))
    weight = float(weights[0]) / scale
    if weight <= 0:  # it knows nothing of the tasks
        return 0.0, Calibration(0.0, 0.0, 0.0, None, 0.0)
    prior = float(weights[1] / weights[0])
    rest = float(weights[2]) if with_rest else None
    fitted = Calibration(weight, 0.0, 0.0, rest, 0.0)
    logits = weight * (likelihoods + prior * empty)
    highest = np.maximum(logits.max(axis=1), -np.inf if rest is None else rest)
    shares = np.exp(logits - highest[:, None])
    total = shares.sum(axis=1) + (0.0 if rest is None else np.exp(rest - highest))
    confidence = shares.max(axis=1) / total
    threshold = _threshold(confidence[inside], confidence[~inside]) if with_rest else 0.0
    return prior, fitted._replace(threshold=round(threshold, 4))


def _threshold(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
    """Of the places between neighbouring confidences the lowest with the highest Youden's index."""
    known = np.sort(np.concatenate([inside, outside]))
    places = np.concatenate([[0.0], (known[1:] + known[:-1]) / 2])
    lost = np.searchsorted(np.sort(inside), places) / len(inside)
    caught = np.searchsorted(np.sort(outside), places) / len(outside)
    index = np.where(lost <= _LOST, caught - lost, -1.0)
    return float(places[int(index.argmax())])


def _earned(
    hybrid: Calibration, embedding: Calibration, signals: Sequence[Signals], label: NDArray[np.int64]
) -> Calibration:
    """``hybrid`` if keywords put more tasks right than wrong, beyond chance; else ``embedding``.

    Likelihood alone gives keywords a little weight that costs accuracy on some texts and brings it
    on others. One-sided sign test at 5 %, normal approximation.
    """

    def right(calibration: Calibration) -> NDArray[np.bool_]:
        best = [int(probabilities(signal, calibration).argmax()) for signal in signals]
        hits: NDArray[np.bool_] = np.array(best) == label
        return hits

    with_keywords, without = right(hybrid), right(embedding)
    gained, lost = int((with_keywords & ~without).sum()), int((without & ~with_keywords).sum())
    return hybrid if gained - lost > 1.645 * np.sqrt(gained + lost) else embedding


@dataclass(frozen=True, slots=True)
class Routed:
    """Where the embedding alone routes the tasks in scope, abstaining aside.

    Attributes:
        chosen: (tasks,) int64, position of the agent chosen.
        label: (tasks,) int64, position of the right one.
    """

    chosen: NDArray[np.int64]
    label: NDArray[np.int64]

    @classmethod
    def of(cls, signals: Sequence[Signals], rows: Sequence[Labelled], agents: Sequence[str]) -> Routed:
        """Take what is known of each row's task; rows out of scope are passed over."""
        chosen, label = [], []
        for signal, row in zip(signals, rows, strict=True):
            assert signal.evidence is not None
            if row.agent != OUT_OF_SCOPE:
                chosen.append(int(signal.evidence.argmax()))
                label.append(agents.index(row.agent))
        return cls(np.array(chosen, dtype=np.int64), np.array(label, dtype=np.int64))

    @property
    def right(self) -> NDArray[np.bool_]:
        """(tasks,) which of them are routed rightly."""
        hits: NDArray[np.bool_] = self.chosen == self.label
        return hits


def _features(signal: Signals) -> NDArray[np.float64]:
    """(agents + 1, 4): cosine, matched, first, and 1 for the last row, which is "nobody"."""
    assert signal.evidence is not None
    count = len(signal.evidence)
    table = np.zeros((count + 1, 4))
    table[:count, 0] = signal.evidence
    table[:count, 1] = [bool(phrases) for phrases in signal.matches.phrases]
    table[list(signal.matches.first), 2] = 1
    table[count, 0] = signal.out_of_scope or 0.0
    table[count, 3] = 1
    return table


def fit(
    features: NDArray[np.floating], label: NDArray[np.int64], used: list[int], signed: Sequence[int] = ()
) -> NDArray[np.float64]:
    """Maximum-likelihood weights of the evidence for each of several answers, by Newton's method.

    Args:
        features: (n, answers, columns).
        label: (n,): the right answer.
        used: The columns that may have a weight.
        signed: Those whose weights may be negative.

    Returns:
        (columns,), 0 for those that are not used.
    """
    active = list(used)
    while True:
        x = features[:, :, active]
        weights = np.zeros(len(active))
        for _ in range(100):
            logits = x @ weights
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            expected = np.einsum("na,naf->nf", p, x)
            gradient = (x[np.arange(len(x)), label] - expected).sum(0) - _RIDGE * weights
            second = np.einsum("na,naf,nag->fg", p, x, x) - expected.T @ expected + _RIDGE * np.eye(len(active))
            step = np.linalg.solve(second, gradient)
            length = float(np.abs(step).max(initial=0.0))
            if length < 1e-9:
                break
            weights += step * min(1.0, 5.0 / length)
        negative = [
            column for column, weight in zip(active, weights, strict=True) if weight < 0 and column not in signed
        ]
        if not negative:
            full = np.zeros(features.shape[-1])
            full[active] = weights
            return full
        active = [column for column in active if column not in negative]
