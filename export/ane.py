"""A BERT encoder laid out for the Apple Neural Engine, with BERT's own weights.

After the principles of "Deploying Transformers on the Apple Neural Engine" (Apple Machine Learning
Research, 2022): tensors are (batch, channels, 1, tokens), linear layers are 1x1 convolutions, attention
is taken apart into its heads, and nothing is reshaped between the embedding and the vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from export.checkpoint import Checkpoint
from export.errors import CheckpointError

# Norms divide by the root of variance + epsilon; BERT's 1e-12 is 0 in fp16.
NORM_EPSILON = 1e-5
# The same for the vector's length. It changes the length by less than fp16 can tell, and no direction.
LENGTH_EPSILON = 1e-6
MASKED = -1e4  # added to attention logits; minus infinity would make rows of padding not a number


def check_supported(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless a checkpoint is a BERT with mean pooling and nothing behind it."""
    config = checkpoint.backbone.config
    what = None
    if config.model_type != "bert":
        what = f"model_type {config.model_type!r}; only 'bert' is supported"
    elif config.hidden_act != "gelu":
        what = f"the activation {config.hidden_act!r}; only 'gelu' is supported"
    elif checkpoint.pooling != ("mean",):
        what = f"the pooling {', '.join(checkpoint.pooling)}; only 'mean' is supported"
    elif checkpoint.dense:
        what = "dense layers behind the pooling, which are not supported"
    if what:
        raise CheckpointError(
            f"{checkpoint.folder}: has {what} in CoreML packages. Leave the CoreML variants out, or use another model."
        )


class AneEncoder(nn.Module):
    """Token ids to a unit vector: a BERT encoder, its mean pooling and its L2 normalisation."""

    def __init__(self, config: Any, padding: int) -> None:
        """Make the network, its weights yet to be loaded; see :meth:`of`.

        Args:
            config: Of a BERT in transformers.
            padding: Id of padding, which the mask is derived from.
        """
        super().__init__()
        size = int(config.hidden_size)
        self.padding = padding
        self.words = nn.Embedding(config.vocab_size, size)
        self.positions = nn.Parameter(torch.empty(1, size, 1, config.max_position_embeddings))
        self.types = nn.Parameter(torch.empty(1, size, 1, 1))
        epsilon = max(float(config.layer_norm_eps), NORM_EPSILON)
        self.norm = ChannelNorm(size, epsilon)
        self.layers = nn.ModuleList(
            AneLayer(size, int(config.num_attention_heads), int(config.intermediate_size), epsilon)
            for _ in range(config.num_hidden_layers)
        )

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> AneEncoder:
        """The encoder with a checkpoint's weights.

        Raises:
            CheckpointError: The checkpoint is of a kind that is not supported, or its tensors are not
                exactly those of the table.
        """
        check_supported(checkpoint)
        with torch.device("meta"):
            encoder = cls(checkpoint.backbone.config, checkpoint.padding)
        wanted = {name: value.shape for name, value in encoder.state_dict().items()}
        state: dict[str, torch.Tensor] = {}
        unknown = []
        for name, tensor in checkpoint.backbone.state_dict().items():
            place = _place(name)
            if place is None or place[0] not in wanted:
                unknown.append(name)
                continue
            state[place[0]] = place[1](tensor).contiguous()
        missing = sorted(wanted.keys() - state.keys())
        wrong = sorted(name for name in state if state[name].shape != wanted[name])
        if unknown or missing or wrong:
            raise CheckpointError(
                f"{checkpoint.folder}: tensors do not fit the network for the ANE; without a place {unknown[:3]}, "
                f"missing {missing[:3]}, of a wrong shape {wrong[:3]}. Leave the variant coreml-ane out, or use "
                "another model."
            )
        encoder.load_state_dict(state, assign=True)
        return encoder.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed one text.

        Args:
            input_ids: (1, tokens) int32 or int64; the padding id at the end is passed over.

        Returns:
            (1, dim) float32, a unit vector.
        """
        mask = (input_ids != self.padding).to(self.positions.dtype)
        additive = ((1.0 - mask) * MASKED)[:, :, None, None]  # keys are the second axis of a head's logits
        weights = mask[:, None, None, :]
        # The one place where the layout changes: the table is looked up by row.
        hidden = self.words(input_ids).transpose(1, 2)[:, :, None, :]
        hidden = self.norm(hidden + self.positions[..., : input_ids.shape[1]] + self.types)
        for layer in self.layers:
            hidden = layer(hidden, additive)
        # Divided before it is summed, so that fp16 holds the sum of a long text as well.
        pooled = (hidden * (weights / weights.sum(-1, keepdim=True))).sum(-1, keepdim=True)
        return unit(pooled).squeeze(3).squeeze(2)


class AneLayer(nn.Module):
    """Attention and feed-forward, each followed by its norm."""

    def __init__(self, size: int, heads: int, inner: int, epsilon: float) -> None:
        super().__init__()
        self.width = size // heads
        self.query = nn.Conv2d(size, size, 1)
        self.key = nn.Conv2d(size, size, 1)
        self.value = nn.Conv2d(size, size, 1)
        self.output = nn.Conv2d(size, size, 1)
        self.attention_norm = ChannelNorm(size, epsilon)
        self.up = nn.Conv2d(size, inner, 1)
        self.down = nn.Conv2d(inner, size, 1)
        self.output_norm = ChannelNorm(size, epsilon)

    def forward(self, hidden: torch.Tensor, additive: torch.Tensor) -> torch.Tensor:
        """(batch, channels, 1, tokens) to the same; ``additive`` (batch, tokens, 1, 1) is added by key."""
        query = (self.query(hidden) * self.width**-0.5).split(self.width, dim=1)
        key = self.key(hidden).transpose(1, 3).split(self.width, dim=3)  # the only transpose of a layer
        value = self.value(hidden).split(self.width, dim=1)
        heads = []
        for q, k, v in zip(query, key, value, strict=True):
            weights = (torch.einsum("bchq,bkhc->bkhq", q, k) + additive).softmax(1)
            heads.append(torch.einsum("bkhq,bchk->bchq", weights, v))
        hidden = self.attention_norm(hidden + self.output(torch.cat(heads, dim=1)))
        inner = nn.functional.gelu(self.up(hidden))
        result: torch.Tensor = self.output_norm(hidden + self.down(inner))
        return result


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (batch, channels, 1, tokens)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(1, size, 1, 1))
        self.bias = nn.Parameter(torch.empty(1, size, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape as ``x``."""
        centred = x - x.mean(1, keepdim=True)
        variance = (centred * centred).mean(1, keepdim=True)
        return centred * torch.rsqrt(variance + self.epsilon) * self.weight + self.bias


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors along axis 1 brought to length 1, without a root or a division that fp16 could make 0."""
    return vectors * torch.rsqrt((vectors * vectors).sum(1, keepdim=True) + LENGTH_EPSILON)


Shape = Callable[[torch.Tensor], torch.Tensor]


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _convolution(tensor: torch.Tensor) -> torch.Tensor:
    """(out, in) to (out, in, 1, 1)."""
    return tensor[:, :, None, None]


def _channels(tensor: torch.Tensor) -> torch.Tensor:
    """(channels,) to (1, channels, 1, 1)."""
    return tensor[None, :, None, None]


def _columns(tensor: torch.Tensor) -> torch.Tensor:
    """(positions, channels) to (1, channels, 1, positions)."""
    return tensor.T[None, :, None, :]


def _first_row(tensor: torch.Tensor) -> torch.Tensor:
    """(types, channels) to (1, channels, 1, 1): a single text is all of type 0."""
    return tensor[0][None, :, None, None]


# By the name in the source: the name here, and how the shape changes.
_EMBEDDINGS: dict[str, tuple[str, Shape]] = {
    "embeddings.word_embeddings.weight": ("words.weight", _as_it_is),
    "embeddings.position_embeddings.weight": ("positions", _columns),
    "embeddings.token_type_embeddings.weight": ("types", _first_row),
    "embeddings.LayerNorm.weight": ("norm.weight", _channels),
    "embeddings.LayerNorm.bias": ("norm.bias", _channels),
}
# The same for what follows ``encoder.layer.<number>.``, which becomes ``layers.<number>.``.
_LAYER: dict[str, tuple[str, Shape]] = {
    "attention.self.query.weight": ("query.weight", _convolution),
    "attention.self.query.bias": ("query.bias", _as_it_is),
    "attention.self.key.weight": ("key.weight", _convolution),
    "attention.self.key.bias": ("key.bias", _as_it_is),
    "attention.self.value.weight": ("value.weight", _convolution),
    "attention.self.value.bias": ("value.bias", _as_it_is),
    "attention.output.dense.weight": ("output.weight", _convolution),
    "attention.output.dense.bias": ("output.bias", _as_it_is),
    "attention.output.LayerNorm.weight": ("attention_norm.weight", _channels),
    "attention.output.LayerNorm.bias": ("attention_norm.bias", _channels),
    "intermediate.dense.weight": ("up.weight", _convolution),
    "intermediate.dense.bias": ("up.bias", _as_it_is),
    "output.dense.weight": ("down.weight", _convolution),
    "output.dense.bias": ("down.bias", _as_it_is),
    "output.LayerNorm.weight": ("output_norm.weight", _channels),
    "output.LayerNorm.bias": ("output_norm.bias", _channels),
}


def _place(name: str) -> tuple[str, Shape] | None:
    """Where a tensor of the source goes, and how its shape changes; None where it has no place."""
    if not name.startswith("encoder.layer."):
        return _EMBEDDINGS.get(name)
    number, _, rest = name.removeprefix("encoder.layer.").partition(".")
    place = _LAYER.get(rest)
    return None if place is None else (f"layers.{number}.{place[0]}", place[1])
