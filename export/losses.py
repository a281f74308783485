"""The terms of the training loss, on cosine similarities of unit vectors.

All take ``cosine`` (n, agents + 1), the similarities of n tasks to the prototypes, the last of which
stands for tasks that are out of scope.
"""

from __future__ import annotations

import torch
from torch import nn


def infonce(
    cosine: torch.Tensor, label: torch.Tensor, temperature: float, others: torch.Tensor | None = None
) -> torch.Tensor:
    """(n,) cross-entropy of the own prototype (van den Oord et al. 2018, arXiv:1807.03748).

    Args:
        cosine: (n, agents + 1).
        label: (n,) int64.
        temperature: Divides the similarities.
        others: (n, m) similarities to further negatives, ``-inf`` where one is none; in-batch tasks
            of other agents, for example.
    """
    logits = cosine if others is None else torch.cat([cosine, others], dim=1)
    return nn.functional.cross_entropy(logits / temperature, label, reduction="none")


def in_batch_negatives(vectors: torch.Tensor, label: torch.Tensor, trusted: torch.Tensor) -> torch.Tensor:
    """(n, n) similarities within a batch, ``-inf`` between tasks of one agent and for labels not ``trusted``."""
    usable = (label[:, None] != label[None, :]) & trusted[None, :]
    return (vectors @ vectors.T).masked_fill(~usable, -torch.inf)


def triplet(cosine: torch.Tensor, label: torch.Tensor, near: torch.Tensor, margin: float) -> torch.Tensor:
    """(n,) margin loss (Schroff et al. 2015, arXiv:1503.03832) between own and rival prototype.

    The rival is the agent ``near`` (n,) that the author noted as the tempting wrong one, or where
    that is -1 the nearest wrong prototype.
    """
    own = cosine.gather(1, label[:, None]).squeeze(1)
    nearest = cosine.scatter(1, label[:, None], -2.0).max(1).values
    noted = cosine.gather(1, near.clamp(min=0)[:, None]).squeeze(1)
    return nn.functional.relu(margin + torch.where(near >= 0, noted, nearest) - own)


def retention(vectors: torch.Tensor, reference: torch.Tensor, label: torch.Tensor, label_share: float) -> torch.Tensor:
    """Mean squared distance of the batch's similarities from a mixture of reference and label.

    The target ``(1 - s) * reference + s * [same agent]`` is the similarity of vectors that hold the
    reference's beside a one-hot label in fixed shares.
    """
    target = (1 - label_share) * (reference @ reference.T) + label_share * (label[:, None] == label[None, :]).float()
    return nn.functional.mse_loss(vectors @ vectors.T, target)


def imitation(vectors: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(n,) one less the cosine to the reference's vectors of the same dimension."""
    return 1 - (vectors * reference).sum(1)


def soft_labels(cosine: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """(n,) cross-entropy to a teacher's probabilities (n, agents + 1) (Hinton et al. 2015, arXiv:1503.02531)."""
    return -(target * nn.functional.log_softmax(cosine / temperature, dim=1)).sum(1)


def advantages(scores: torch.Tensor, clip: float) -> torch.Tensor:
    """Rewards of one task's candidate agents, normalised within the group and clipped.

    As group-relative policy optimisation does it (Shao et al. 2024, arXiv:2402.03300).

    Args:
        scores: (groups, agents) judged scores, NaN for agents that were not judged.
        clip: Largest absolute advantage.

    Returns:
        (groups, agents) float32; 0 for agents that were not judged.
    """
    mean = scores.nanmean(1, keepdim=True)
    spread = ((scores - mean) ** 2).nanmean(1, keepdim=True).sqrt()
    return ((scores - mean) / spread.clamp(min=1e-6)).clamp(-clip, clip).nan_to_num(0.0)


def reward(cosine: torch.Tensor, advantage: torch.Tensor, temperature: float) -> torch.Tensor:
    """(n,) negated expected advantage under the router's own probabilities.

    The whole group is enumerated, so that the policy gradient is exact and nothing is sampled.
    """
    policy = nn.functional.softmax(cosine[:, : advantage.shape[1]] / temperature, dim=1)
    return -(policy * advantage).sum(1)
