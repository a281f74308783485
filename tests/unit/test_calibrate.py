from __future__ import annotations

import numpy as np
import pytest

from edge.evaluate import Labelled, calibration_error
from edge.keywords import Matches
from edge.router import Signals, probabilities

pytest.importorskip("export.calibrate")
from export.calibrate import _threshold, calibrate


def rows(count: int, out_of_scope: int, keywords: bool) -> tuple[list[Signals], list[Labelled]]:
    """Tasks whose right agent is drawn from the softmax of 10 x cosine: calibration must find the 10."""
    generator = np.random.default_rng(1)
    signals, labelled = [], []
    for index in range(count + out_of_scope):
        cosine = generator.uniform(-0.3, 0.6, 3).astype(np.float32)
        weights = np.exp(10 * cosine)
        label = int(generator.choice(3, p=weights / weights.sum()))
        phrases = tuple(("word",) if keywords and i == label else () for i in range(3))
        inside = index < count
        matches = Matches(phrases, (label,) if keywords else ())
        seen = cosine if inside else cosine - 0.5
        signals.append(Signals(matches, seen, seen, 0.0 if inside else 0.9, False, False))
        labelled.append(Labelled("x", "abc"[label] if inside else "none"))
    return signals, labelled


def test_the_true_temperature_is_found() -> None:
    signals, labelled = rows(4000, 0, keywords=False)
    fitted = calibrate(signals, labelled, "abc")["embedding"]
    assert fitted.cosine == pytest.approx(10, rel=0.06)
    assert (fitted.matched, fitted.out_of_scope, fitted.threshold) == (0.0, None, 0.0)
    outcomes = []
    for signal, row in zip(signals, labelled, strict=True):
        p = probabilities(signal, fitted)
        outcomes.append((float(p.max()), "abc"[int(p.argmax())] == row.agent))
    assert calibration_error(outcomes) < 0.03


def test_keywords_that_are_right_earn_weight_and_thresholds_cut_the_stated_share() -> None:
    signals, labelled = rows(500, 60, keywords=True)
    fitted = calibrate(signals, labelled, "abc")
    assert fitted["hybrid"].matched + fitted["hybrid"].first > 2
    embedding = fitted["embedding"]
    below = np.array([probabilities(signal, embedding).max() for signal in signals]) < embedding.threshold
    assert below[:500].mean() <= 0.03


def test_the_threshold_has_the_highest_youden_index() -> None:
    generator = np.random.default_rng(3)
    inside, outside = generator.beta(8, 1, 2000), generator.beta(1, 8, 100)
    threshold = _threshold(inside, outside)
    index = [(outside < t).mean() - (inside < t).mean() for t in (threshold, *np.linspace(0, 1, 300))]
    assert index[0] == max(index)
    assert 0.3 < threshold < 0.7
    # Where the two cannot be told apart, no more than three in a hundred tasks are given up.
    assert (inside < _threshold(inside, inside[:100])).mean() <= 0.03
    assert _threshold(np.array([0.5, 0.9]), np.array([0.95])) == 0.0


def test_without_keywords_or_out_of_scope_tasks_nothing_breaks() -> None:
    fitted = calibrate(*rows(50, 0, keywords=False), "abc")
    assert (fitted["keyword"].matched, fitted["keyword"].first) == (0.0, 0.0)


def test_keywords_never_cost_accuracy_where_the_rule_was_fitted() -> None:
    generator = np.random.default_rng(2)
    signals, labelled = [], []
    for _ in range(400):
        label = int(generator.integers(3))
        cosine = np.full(3, 0.1, dtype=np.float32)
        cosine[label] = 0.25
        said = int(generator.integers(3)) if generator.random() < 0.4 else label  # right in most, yet worse
        phrases = tuple(("word",) if i == said else () for i in range(3))
        signals.append(Signals(Matches(phrases, (said,)), cosine, cosine, 0.0, False, False))
        labelled.append(Labelled("x", "abc"[label]))
    fitted = calibrate(signals, labelled, "abc")

    def right(strategy: str) -> int:
        best = [int(probabilities(signal, fitted[strategy]).argmax()) for signal in signals]
        return sum("abc"[b] == row.agent for b, row in zip(best, labelled, strict=True))

    assert right("hybrid") >= right("embedding") == 400
    assert right("keyword") < 400
