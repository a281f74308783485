"""One network from token ids to unit vectors: backbone, pooling, dense layers, L2 normalisation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from export.backbones import Backbone, hidden_states


class SentenceEncoder(nn.Module):
    """Backbone with everything up to the unit vector inside."""

    def __init__(self, backbone: Backbone, pooling: Sequence[str] = ("mean",), dense: Sequence[nn.Module] = ()) -> None:
        """Put the parts together.

        Args:
            backbone: Of an architecture that :mod:`export.backbones` knows.
            pooling: One or more of ``POOLING``; several are put one after another.
            dense: What the pooled vector goes through before it is normalised.
        """
        super().__init__()
        self.backbone: Backbone = backbone
        self.pooling = tuple(pooling)
        self.dense = nn.Sequential(*dense)

    @property
    def dim(self) -> int:
        """Number of values of a vector."""
        linear = [layer for layer in self.dense.modules() if isinstance(layer, nn.Linear)]
        return linear[-1].out_features if linear else int(self.backbone.config.hidden_size) * len(self.pooling)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embed a padded batch.

        Args:
            input_ids: (batch, tokens) int64.
            attention_mask: (batch, tokens) int64; 1 for tokens, 0 for padding.

        Returns:
            (batch, dim) float32, rows of unit length.
        """
        return self.pool(hidden_states(self.backbone, input_ids, attention_mask), attention_mask)

    def pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, dim) unit vectors of (batch, tokens, hidden) states."""
        hidden = hidden.float()  # under autocast the layers hand over bfloat16
        pooled = [POOLING[mode](hidden, attention_mask) for mode in self.pooling]
        vectors = self.dense(torch.cat(pooled, dim=1) if len(pooled) > 1 else pooled[0])
        return nn.functional.normalize(vectors, dim=1)


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.to(torch.float32)
    return (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp(min=1e-9)


def _mean_sqrt_len(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.to(torch.float32)
    return (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp(min=1e-9).sqrt()


def _weighted_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weights rise from token to token: 1, 2, 3 ..."""
    weights = (mask.cumsum(1) * mask).to(torch.float32)
    return (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp(min=1e-9)


def _max(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (hidden + (mask.unsqueeze(-1).to(torch.float32) - 1.0) * 1e9).max(1).values


def _cls(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The first token's state, wherever the padding is."""
    return _at(hidden, mask.argmax(1))


def _last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last token's state, wherever the padding is: the first place where all tokens are counted."""
    return _at(hidden, mask.cumsum(1).argmax(1))


def _at(hidden: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    index = place[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, index).squeeze(1)


# By the names of sentence-transformers.
POOLING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
# Names of the bundle format, where they are not those.
BUNDLE_POOLING = {"mean_sqrt_len_tokens": "mean_sqrt_len", "weightedmean": "weighted_mean", "lasttoken": "last"}


def forward(model: SentenceEncoder, ids: Sequence[list[int]], precision: str = "float32") -> torch.Tensor:
    """(n, dim) float32 vectors of token ids, padded to one batch; they are where the network is.

    ``precision`` is that of the layers: ``float32`` or ``bfloat16``.
    """
    device = next(model.parameters()).device
    padded = pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in ids], batch_first=True).to(device)
    halved = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
    with halved:
        vectors: torch.Tensor = model(padded, mask)
    return vectors.float()


@torch.no_grad()
def embed(
    model: SentenceEncoder, ids: Sequence[list[int]], precision: str = "float32", progress: str = ""
) -> torch.Tensor:
    """(n, dim) float32 vectors of any number of rows of token ids, on the CPU and without gradients.

    ``progress`` is what a progress bar says; without it there is none.
    """
    model.eval()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # batches of like lengths need little padding
    result = torch.empty(len(ids), model.dim)
    for start in tqdm(range(0, len(order), 128), desc=progress, disable=not progress, unit="batch"):
        part = order[start : start + 128]
        result[part] = forward(model, [ids[i] for i in part], precision).cpu()
    return result
