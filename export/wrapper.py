"""One network from token ids to unit vectors: backbone, masked mean pooling, L2 normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import BertModel, MPNetModel


class SentenceEncoder(nn.Module):
    """Backbone with pooling and normalisation inside.

    The additive attention mask is made here as a 4-D tensor and handed to the encoder's layers
    directly: Hugging Face's own mask helpers trace into graphs that neither ONNX Runtime's fusions
    nor coremltools understand.
    """

    def __init__(self, backbone: BertModel | MPNetModel) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embed a padded batch.

        Args:
            input_ids: (batch, tokens) int64.
            attention_mask: (batch, tokens) int64; 1 for tokens, 0 for padding.

        Returns:
            (batch, dim) float32, rows of unit length.
        """
        weights = attention_mask.to(torch.float32)
        additive = (1.0 - weights[:, None, None, :]) * -10000.0
        if isinstance(self.backbone, MPNetModel):
            embedded = self.backbone.embeddings(input_ids=input_ids)
            no_head_mask = [None] * self.backbone.config.num_hidden_layers
            hidden = self.backbone.encoder(embedded, attention_mask=additive, head_mask=no_head_mask)[0]
        else:
            embedded = self.backbone.embeddings(input_ids=input_ids, token_type_ids=torch.zeros_like(input_ids))
            hidden = self.backbone.encoder(embedded, attention_mask=additive)[0]
        hidden = hidden.float()  # under autocast the layers hand over bfloat16
        pooled = (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp(min=1e-9)
        return nn.functional.normalize(pooled, dim=1)


def forward(model: SentenceEncoder, ids: Sequence[list[int]], precision: str = "float32") -> torch.Tensor:
    """(n, dim) float32 vectors of token ids, padded to one batch.

    ``precision`` is that of the layers: ``float32`` or ``bfloat16``.
    """
    padded = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in ids], batch_first=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        vectors: torch.Tensor = model(padded, mask)
    return vectors.float()


@torch.no_grad()
def embed(
    model: SentenceEncoder, ids: Sequence[list[int]], precision: str = "float32", progress: str = ""
) -> torch.Tensor:
    """(n, dim) float32 vectors of any number of rows of token ids, without gradients.

    ``progress`` is what a progress bar says; without it there is none.
    """
    model.eval()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # batches of like lengths need little padding
    result = torch.empty(len(ids), model.backbone.config.hidden_size)
    for start in tqdm(range(0, len(order), 128), desc=progress, disable=not progress, unit="batch"):
        part = order[start : start + 128]
        result[part] = forward(model, [ids[i] for i in part], precision)
    return result
