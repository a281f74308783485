"""Heads on top of a trained encoder: which one tells the agents apart best on the dev split.

A head of single prototypes is what the encoder was trained with, and what agents of one's own need.
Several prototypes an agent, or a linear layer, replace it where they are better by more than noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from export.checkpoint import Head, Linear
from export.errors import RecipeError

# A head must beat the simpler one before it by this share of the dev tasks: a fifth of a standard
# error at 90 % on 1,000 tasks, so that ties go to the simple one.
_MARGIN = 0.002
_RIDGE = 0.01  # of the linear head, towards the prototypes: best of 1e-2, 1e-3, 1e-4 on dev
_SCALE = 14.0  # of the prototypes' cosines as logits: 1 / temperature

Part = tuple[torch.Tensor, torch.Tensor]  # vectors (n, dim) and labels (n,), the last label out of scope


def choose_head(trained: Head, parts: dict[str, Part], kinds: Sequence[str]) -> tuple[Head, dict[str, float]]:
    """Fit heads on ``train`` and take the best on ``dev``, the earlier one if they are close.

    Args:
        trained: Single prototypes.
        parts: Vectors and labels of ``train`` and ``dev``.
        kinds: What to try besides: ``prototypes-K`` for K prototypes an agent, or ``linear``.

    Returns:
        The head, and dev accuracy (in-scope tasks) by kind.

    Raises:
        RecipeError: An unknown kind.
    """
    chosen, compared = trained, {"prototypes-1": _accuracy(trained, parts["dev"])}
    best = compared["prototypes-1"]
    for kind in kinds:
        if kind == "linear":
            head = _linear(trained, parts["train"])
        elif kind.startswith("prototypes-") and kind.removeprefix("prototypes-").isdecimal():
            head = _several(trained, parts["train"], int(kind.removeprefix("prototypes-")))
        else:
            raise RecipeError(f"heads: unknown kind {kind!r}. Use 'linear' or 'prototypes-K', such as 'prototypes-4'.")
        compared[kind] = _accuracy(head, parts["dev"])
        if compared[kind] > best + _MARGIN:
            chosen, best = head, compared[kind]
    return chosen, compared


def scores(head: Head, vectors: torch.Tensor) -> torch.Tensor:
    """(n, agents) what a head says of vectors (n, dim)."""
    if head.linear is not None:
        return vectors @ head.linear.weight[:-1].T + head.linear.bias[:-1]
    similarity = torch.einsum("nd,akd->nak", vectors, head.prototypes)
    return similarity.max(dim=2).values


def _accuracy(head: Head, part: Part) -> float:
    vectors, label = part
    inside = label < len(head.agents)
    if not inside.any():
        return 0.0
    return float((scores(head, vectors[inside]).argmax(1) == label[inside]).float().mean())


def _several(trained: Head, part: Part, count: int) -> Head:
    """Means of each agent's clusters: k-means on the sphere."""
    vectors, label = part
    rows = []
    for agent in range(len(trained.agents)):
        members = vectors[label == agent]
        centres = trained.prototypes[agent, :1]
        # Farthest-point seeding: deterministic, and a rare kind of task gets a centre.
        for _ in range(min(count, len(members)) - 1):
            far = (members @ centres.T).max(1).values.argmin()
            centres = torch.cat([centres, members[far][None]])
        for _ in range(20):
            nearest = (members @ centres.T).argmax(1)
            means = [members[nearest == k].mean(0) for k in range(len(centres)) if (nearest == k).any()]
            centres = nn.functional.normalize(torch.stack(means), dim=1) if means else centres
        rows.append(torch.cat([centres, centres[:1].expand(count - len(centres), -1)]))
    return Head(trained.agents, torch.stack(rows), trained.out_of_scope)


def _linear(trained: Head, part: Part) -> Head:
    """Multinomial logistic regression, drawn towards the prototypes; scores on the scale of cosines."""
    vectors, label = part
    anchor = torch.cat([trained.prototypes[:, 0], trained.out_of_scope[None]]) * _SCALE
    weight, bias = nn.Parameter(anchor.clone()), nn.Parameter(torch.zeros(len(anchor)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(vectors @ weight.T + bias, label)
        loss = loss + _RIDGE * (weight - anchor).square().sum() / len(anchor)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    linear = Linear(weight.detach() / _SCALE, bias.detach() / _SCALE)
    return Head(trained.agents, trained.prototypes, trained.out_of_scope, linear)
