"""BERT encoders and Llama- or Qwen2-like decoders laid out for the Apple Neural Engine, with their own weights.

After the principles of "Deploying Transformers on the Apple Neural Engine" (Apple Machine Learning
Research, 2022): tensors are (batch, channels, 1, tokens), linear layers are 1x1 convolutions, attention
is taken apart into its heads, and nothing is reshaped between the embedding and the vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from export.backbones import is_causal
from export.checkpoint import Checkpoint
from export.errors import CheckpointError

# Norms divide by the root of variance + epsilon; BERT's 1e-12 is 0 in fp16.
NORM_EPSILON = 1e-5
# The same for the vector's length. It changes the length by less than fp16 can tell, and no direction.
LENGTH_EPSILON = 1e-6
MASKED = -1e4  # added to attention logits; minus infinity would make rows of padding not a number


@dataclass(frozen=True, slots=True)
class _Supported:
    """What a network of a kind may have."""

    activation: str
    pooling: tuple[str, ...]


_DECODER = _Supported("silu", ("mean", "lasttoken"))
_SUPPORTED = {"bert": _Supported("gelu", ("mean",)), "llama": _DECODER, "qwen2": _DECODER}


def check_supported(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless a checkpoint is of a kind that packages can hold.

    That is a BERT with mean pooling, or a Llama- or Qwen2-like decoder with mean or last-token pooling, and nothing
    behind the pooling.
    """
    config = checkpoint.backbone.config
    known = _SUPPORTED.get(config.model_type)
    what = None
    if known is None:
        what = f"model_type {config.model_type!r}; only {', '.join(_SUPPORTED)} are supported"
    elif config.hidden_act != known.activation:
        what = f"the activation {config.hidden_act!r}; only {known.activation!r} is supported"
    elif checkpoint.pooling not in [(mode,) for mode in known.pooling]:
        what = f"the pooling {', '.join(checkpoint.pooling)}; only {' or '.join(known.pooling)} is supported"
    elif checkpoint.dense:
        what = "dense layers behind the pooling, which are not supported"
    if what:
        raise CheckpointError(
            f"{checkpoint.folder}: has {what} in CoreML packages. Leave the CoreML variants out, or use another model."
        )


def padding_of(checkpoint: Checkpoint) -> int:
    """The id that texts are padded with for a package.

    A decoder's padding token is often the token that ends a text, which last-token pooling must see. So decoders are
    padded with an id that no text can have: the one behind the embedding's last row.
    """
    return int(checkpoint.backbone.config.vocab_size) if is_causal(checkpoint.backbone) else checkpoint.padding


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


class AneDecoder(nn.Module):
    """Token ids to a unit vector: a decoder, its mean or last-token pooling and its L2 normalisation.

    Texts are padded at their end, so that the causal mask hides padding from them and positions count from the first
    token on; only the pooling has to know where a text ends.
    """

    def __init__(self, checkpoint: Checkpoint, longest: int) -> None:
        """Lay out a checkpoint's decoder; weights are shared with it.

        Args:
            checkpoint: A supported decoder.
            longest: Tokens that there are positions for.
        """
        super().__init__()
        backbone, config = checkpoint.backbone, checkpoint.backbone.config
        self.padding, self.pooling = padding_of(checkpoint), checkpoint.pooling[0]
        self.words = backbone.embed_tokens
        self.layers = nn.ModuleList(AneDecoderLayer(layer, config) for layer in backbone.layers)
        self.norm = RootNorm(backbone.norm, 4)
        cos, sin = rotations(backbone, longest)
        scale, heads = cos.shape[1] ** -0.5, int(config.num_attention_heads)
        # Of all heads one below the other. What turns the queries scales them as well.
        turns = [_columns(table.repeat(1, heads)) for table in (cos * scale, sin * scale, cos, sin)]
        channels = cos.shape[1] * int(config.num_key_value_heads)
        turns[2:] = [table[:, :channels] for table in turns[2:]]
        self.turns = nn.ParameterList(nn.Parameter(table, requires_grad=False) for table in turns)
        self.causal = nn.Parameter(causal_mask(longest).T[None, :, None, :], requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed one text.

        Args:
            input_ids: (1, tokens) int32; :func:`padding_of` at the end is passed over.

        Returns:
            (1, dim) float32, a unit vector.
        """
        tokens = input_ids.shape[1]
        hidden = look_up(self.words, input_ids).transpose(1, 2)[:, :, None, :]
        turns = [table[..., :tokens] for table in self.turns]
        for layer in self.layers:
            hidden = layer(hidden, turns, self.causal[:, :tokens, :, :tokens])
        weights = token_weights(input_ids, self.padding, self.pooling)
        pooled = (self.norm(hidden) * weights[:, None, None, :]).sum(-1, keepdim=True)
        return unit_of_large(pooled).squeeze(3).squeeze(2)


class AneDecoderLayer(nn.Module):
    """Attention and gated feed-forward, each behind its norm."""

    def __init__(self, layer: Any, config: Any) -> None:
        """Lay out a layer of a Llama or a Qwen2 in transformers."""
        super().__init__()
        attention, feed_forward = layer.self_attn, layer.mlp
        self.width = int(attention.head_dim)
        self.group = int(config.num_attention_heads) // int(config.num_key_value_heads)
        self.attention_norm = RootNorm(layer.input_layernorm, 4)
        self.query = _as_convolution(attention.q_proj)
        self.key = _as_convolution(attention.k_proj)
        self.value = _as_convolution(attention.v_proj)
        self.output = _as_convolution(attention.o_proj)
        self.inner_norm = RootNorm(layer.post_attention_layernorm, 4)
        self.gate = _as_convolution(feed_forward.gate_proj)
        self.up = _as_convolution(feed_forward.up_proj)
        self.down = _as_convolution(feed_forward.down_proj)

    def forward(self, hidden: torch.Tensor, turns: Sequence[torch.Tensor], causal: torch.Tensor) -> torch.Tensor:
        """(1, channels, 1, tokens) to the same.

        Args:
            hidden: (1, channels, 1, tokens).
            turns: Cosines and sines of the queries, then of the keys, (1, channels, 1, tokens) each.
            causal: (1, tokens, 1, tokens), added by key and query.
        """
        normed = self.attention_norm(hidden)
        query = torch.split(self._turned(self.query(normed), turns[0], turns[1]), self.width, dim=1)
        key = torch.split(self._turned(self.key(normed), turns[2], turns[3]).transpose(1, 3), self.width, dim=3)
        value = torch.split(self.value(normed), self.width, dim=1)
        heads = []
        for i, q in enumerate(query):
            weights = (torch.einsum("bchq,bkhc->bkhq", q, key[i // self.group]) + causal).softmax(1)
            heads.append(torch.einsum("bkhq,bchk->bchq", weights, value[i // self.group]))
        hidden = hidden + self.output(torch.cat(heads, dim=1))
        normed = self.inner_norm(hidden)
        result: torch.Tensor = hidden + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return result

    def _turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of all heads at once: the halves of each head trade places."""
        halves = torch.split(x, self.width // 2, dim=1)
        traded = torch.cat([halves[i ^ 1] for i in range(len(halves))], dim=1)
        return x * cos + traded * sin


class RootNorm(nn.Module):
    """Root-mean-square norm along axis 1 or the last one, in a form that half precision holds.

    Residual streams of decoders exceed 1,000, the squares of which fp16 does not hold. The norm is the same for values
    and epsilon's root divided by any number: here by the largest value, and at least by that root.
    """

    def __init__(self, norm: Any, rank: int = 3) -> None:
        """Take over a LlamaRMSNorm or Qwen2RMSNorm of transformers.

        Args:
            norm: The norm.
            rank: Of the tensors: 3 with the channels along the last axis, 4 with the channels along axis 1.
        """
        super().__init__()
        self.axis = 1 if rank == 4 else -1
        weight = norm.weight.detach()
        self.weight = nn.Parameter(_channels(weight) if rank == 4 else weight, requires_grad=False)
        root = torch.full([1] * rank, float(norm.variance_epsilon) ** 0.5)
        self.root = nn.Parameter(root, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape as ``x``."""
        scale = torch.maximum(x.abs().amax(self.axis, keepdim=True), self.root)
        x, root = x / scale, self.root / scale
        mean = (x * x).mean(self.axis, keepdim=True)
        return x * torch.rsqrt(mean + root * root) * self.weight


def look_up(words: nn.Embedding, input_ids: torch.Tensor) -> torch.Tensor:
    """(1, tokens, channels) of (1, tokens) ids; padding, behind the last row, is taken for that row."""
    last = torch.tensor(words.num_embeddings - 1, dtype=input_ids.dtype)
    result: torch.Tensor = words(torch.minimum(input_ids, last))
    return result


def rotations(backbone: Any, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a decoder's rotary embedding, (longest, values of a head) each.

    With the halves of a head trading places, the first half's sines are negative.
    """
    with torch.no_grad():
        cos, sin = backbone.rotary_emb(torch.zeros(1, 1, 1), torch.arange(longest)[None])
    half = cos.shape[-1] // 2
    return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=1)


def causal_mask(longest: int) -> torch.Tensor:
    """(longest, longest), added to logits of queries by keys: what comes later is not seen."""
    return torch.full((longest, longest), MASKED).triu(1)


def token_weights(input_ids: torch.Tensor, padding: int, pooling: str) -> torch.Tensor:
    """(1, tokens): what each token of a text counts in its vector.

    Args:
        input_ids: (1, tokens), padded at the end.
        padding: Id of padding.
        pooling: ``mean`` or ``lasttoken``.
    """
    mask = (input_ids != padding).to(torch.float32)
    if pooling == "mean":
        return mask / mask.sum(1, keepdim=True)  # shares, the sums of which fp16 holds for long texts as well
    return mask - torch.cat([mask[:, 1:], torch.zeros(1, 1)], dim=1)  # 1 where nothing follows


def unit_of_large(vectors: torch.Tensor) -> torch.Tensor:
    """Like :func:`unit`, for vectors whose squares fp16 does not hold."""
    return unit(vectors / vectors.abs().amax(1, keepdim=True))


def _as_convolution(linear: nn.Linear) -> nn.Conv2d:
    """A linear layer as a 1x1 convolution of the same weights."""
    with torch.device("meta"):
        convolution = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
    convolution.weight = nn.Parameter(_convolution(linear.weight.detach()), requires_grad=False)
    convolution.bias = linear.bias
    return convolution


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
