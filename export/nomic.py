"""The nomic-bert encoder, which transformers knows only as remote code: BERT with rotary positions and SwiGLU.

Post-norm layers, one product for queries, keys and values, no biases but the norms' (Nussbaum et al.
2024, arXiv:2402.01613; the graph is that of llama.cpp's ``bert.cpp``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class NomicBertConfig:
    """Sizes of the network."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float
    rope_theta: float
    model_type: str = "nomic-bert"


class NomicBert(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(2, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(NomicBertLayer(config) for _ in range(config.num_hidden_layers))
        width = config.hidden_size // config.num_attention_heads
        frequencies = config.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.frequencies: torch.Tensor

    def forward(self, input_ids: torch.Tensor, additive: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the layers.

        Args:
            input_ids: (batch, tokens) int64.
            additive: (batch, 1, 1, tokens) added to the attention's logits.
            positions: (batch, tokens) int64.

        Returns:
            (batch, tokens, hidden) float32.
        """
        angles = positions[:, None, :, None].to(torch.float32) * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        types = self.token_type_embeddings.weight[0]
        hidden: torch.Tensor = self.norm(self.word_embeddings(input_ids) + types)
        for layer in self.layers:
            hidden = layer(hidden, additive, cos, sin)
        return hidden


class NomicBertLayer(nn.Module):
    """Attention and gated feed-forward, each followed by its norm."""

    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.attention_output = nn.Linear(size, size, bias=False)
        self.attention_norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.up = nn.Linear(size, inner, bias=False)
        self.gate = nn.Linear(size, inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)
        self.output_norm = nn.LayerNorm(size, config.layer_norm_eps)

    def forward(
        self, hidden: torch.Tensor, additive: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """(batch, tokens, hidden) to the same."""
        batch, tokens, size = hidden.shape
        width = size // self.heads
        query, key, value = self.qkv(hidden).view(batch, tokens, 3, self.heads, width).permute(2, 0, 3, 1, 4)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        weights = (query @ key.transpose(2, 3) * width**-0.5 + additive).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, tokens, size)
        hidden = self.attention_norm(hidden + self.attention_output(mixed))
        inner = nn.functional.silu(self.gate(hidden)) * self.up(hidden)
        result: torch.Tensor = self.output_norm(hidden + self.down(inner))
        return result


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
