from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
from export import losses  # noqa: E402

COSINE = torch.tensor([[0.9, 0.1, -0.2], [0.2, 0.4, 0.6]])
LABEL = torch.tensor([0, 1])


def test_infonce_is_cross_entropy_over_prototypes_and_given_negatives() -> None:
    first, second = losses.infonce(COSINE, LABEL, 0.5).tolist()
    assert first == pytest.approx(-math.log(math.exp(1.8) / (math.exp(1.8) + math.exp(0.2) + math.exp(-0.4))))
    assert second == pytest.approx(-math.log(math.exp(0.8) / (math.exp(0.4) + math.exp(0.8) + math.exp(1.2))))
    harder = losses.infonce(COSINE, LABEL, 0.5, torch.tensor([[0.8, -torch.inf], [-torch.inf, -torch.inf]]))
    assert harder[0] > first
    assert float(harder[1]) == pytest.approx(second)


def test_in_batch_negatives_are_trusted_tasks_of_other_agents() -> None:
    vectors = torch.eye(3)
    usable = losses.in_batch_negatives(vectors, torch.tensor([0, 0, 1]), torch.tensor([True, True, False]))
    assert torch.isfinite(usable).tolist() == [[False, False, False], [False, False, False], [True, True, False]]


def test_triplet_takes_the_noted_rival_or_else_the_nearest() -> None:
    noted = losses.triplet(COSINE, LABEL, torch.tensor([2, 0]), 0.5)
    assert noted.tolist() == pytest.approx([0.0, 0.5 + 0.2 - 0.4])
    nearest = losses.triplet(COSINE, LABEL, torch.tensor([-1, -1]), 0.9)
    assert nearest.tolist() == pytest.approx([0.9 + 0.1 - 0.9, 0.9 + 0.6 - 0.4])


def test_retention_vanishes_where_similarities_are_the_mixture() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    label = torch.tensor([0, 1, 0, 2, 1])
    assert float(losses.retention(vectors, vectors, label, 0.0)) == pytest.approx(0, abs=1e-9)
    assert float(losses.retention(vectors, vectors, label, 0.5)) > 0
    assert losses.imitation(vectors, vectors).abs().max() < 1e-6


def test_soft_labels_are_least_at_the_teachers_own_probabilities() -> None:
    target = (COSINE / 0.5).softmax(1)
    least = losses.soft_labels(COSINE, target, 0.5).sum()
    assert least < losses.soft_labels(COSINE + torch.tensor([0.2, 0.0, 0.0]), target, 0.5).sum()


def test_advantages_are_normalised_within_a_task_clipped_and_zero_for_the_unjudged() -> None:
    scores = torch.tensor([[1.0, 0.0, torch.nan, 0.5], [3.0, 3.0, 3.0, 3.0]])
    advantage = losses.advantages(scores, 1.0)
    assert advantage[0].tolist() == pytest.approx([1.0, -1.0, 0.0, 0.0])
    assert advantage[1].tolist() == [0, 0, 0, 0]
    assert float(losses.advantages(scores, 5.0)[0, 0]) == pytest.approx(math.sqrt(1.5))


def test_reward_rises_with_the_probability_of_the_better_agent() -> None:
    advantage = losses.advantages(torch.tensor([[1.0, 0.0]]), 2.0)
    good, bad = (losses.reward(torch.tensor([row]), advantage, 0.1) for row in ([0.9, 0.1, 0.0], [0.1, 0.9, 0.0]))
    assert float(good) < 0 < float(bad)
