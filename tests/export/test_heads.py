from __future__ import annotations

import pytest
import torch

from export.checkpoint import Head
from export.errors import RecipeError
from export.heads import choose_head, scores


def part(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Agent 0 has two kinds of tasks on opposite sides of agent 1's."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[1.0, 0.9, 0.0], [1.0, -0.9, 0.0], [1.0, 0.0, 0.1], [0.0, 0.0, -1.0]])
    kind = torch.randint(0, 4, (300,), generator=generator)
    vectors = centres[kind] + 0.1 * torch.randn(300, 3, generator=generator)
    return torch.nn.functional.normalize(vectors, dim=1), torch.tensor([0, 0, 1, 2])[kind]


@pytest.fixture
def single() -> Head:
    vectors, label = part(0)
    means = torch.nn.functional.normalize(torch.stack([vectors[label == a].mean(0) for a in range(3)]), dim=1)
    return Head(("a", "b"), means[:2, None], means[2])


def test_several_prototypes_win_where_an_agent_has_several_kinds_of_tasks(single: Head) -> None:
    head, compared = choose_head(single, {"train": part(0), "dev": part(1)}, ["prototypes-3"])
    assert head.prototypes.shape == (2, 3, 3)
    assert head.linear is None
    assert compared["prototypes-3"] > 0.95 > compared["prototypes-1"]
    torch.testing.assert_close(head.prototypes.norm(dim=2), torch.ones(2, 3))
    vectors, label = part(2)
    assert (scores(head, vectors).argmax(1) == label)[label < 2].float().mean() > 0.95


def test_a_linear_head_wins_where_prototypes_lie_askew(single: Head) -> None:
    askew = Head(
        single.agents,
        torch.nn.functional.normalize(single.prototypes + torch.tensor([0.0, 0.8, 0.0]), dim=2),
        single.out_of_scope,
    )
    vectors, _ = part(0)
    parts = {name: (vectors, (vectors[:, 1] > 0).long()) for name in ("train", "dev")}
    head, compared = choose_head(askew, parts, ["linear"])
    assert compared["linear"] > compared["prototypes-1"]
    assert head.linear is not None
    assert head.linear.weight.shape == (3, 3)


def test_ties_go_to_the_trained_prototypes(single: Head) -> None:
    vectors = torch.nn.functional.normalize(torch.cat([single.prototypes[:, 0]] * 20), dim=1)
    same = {name: (vectors, torch.tensor([0, 1] * 20)) for name in ("train", "dev")}
    head, compared = choose_head(single, same, ["prototypes-2", "linear"])
    assert head is single
    assert compared == {"prototypes-1": 1.0, "prototypes-2": 1.0, "linear": 1.0}


@pytest.mark.parametrize("kind", ["trees", "prototypes-", "prototypes-x"])
def test_unknown_heads_are_named(single: Head, kind: str) -> None:
    with pytest.raises(RecipeError, match="unknown kind"):
        choose_head(single, {"train": part(0), "dev": part(1)}, [kind])
