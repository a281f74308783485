"""The architectures that can be exported: how a network is made, and run on ids and a mask.

Masks and positions are made here and handed to the layers directly: Hugging Face's own mask helpers
trace into graphs that neither ONNX Runtime's fusions nor coremltools understand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import transformers

from export.nomic import NomicBert

# A network of transformers or a NomicBert: a module with a `config`, which torch's types do not know.
Backbone: TypeAlias = Any

_MASKED = -10000.0  # added to attention logits: finite in fp16, and rows that see nothing stay finite


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture.

    Attributes:
        name: What the names of its classes in transformers begin with; they are imported when they are
            needed, since some compile on import.
        run: (network, ids, mask) to (batch, tokens, hidden) states.
        prefix: What names of tensors begin with where the network lies within a larger one.
        reserved: Positions that texts cannot have.
        causal: Tokens see only what is before them, so that the last one's state stands for a text.
        without_pooler: The network has a pooler that is not wanted.
    """

    name: str
    run: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    prefix: str
    reserved: int = 0
    causal: bool = False
    without_pooler: bool = False

    def config(self, values: dict[str, Any]) -> Any:
        """The configuration that ``config.json`` holds."""
        return getattr(transformers, f"{self.name}Config").from_dict(values)

    def make(self, config: Any) -> Backbone:
        """The network, with eager attention, which takes the additive mask in training and in export."""
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{self.name}Model")
        return model(config, add_pooling_layer=False) if self.without_pooler else model(config)


def hidden_states(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Run a network.

    Args:
        backbone: A network of one of ``ARCHITECTURES``, or a :class:`NomicBert`.
        ids: (batch, tokens) int64.
        mask: (batch, tokens) int64; 1 for tokens, 0 for padding.

    Returns:
        (batch, tokens, hidden); what stands at padding means nothing.
    """
    run = _run_nomic if isinstance(backbone, NomicBert) else architecture_of(backbone).run
    return run(backbone, ids, mask)


def is_causal(backbone: Backbone) -> bool:
    """Whether tokens see only what is before them."""
    kind = backbone.config.model_type
    return kind in ARCHITECTURES and ARCHITECTURES[kind].causal


def architecture_of(backbone: Backbone) -> Architecture:
    """The architecture of a network."""
    return ARCHITECTURES[backbone.config.model_type]


def _additive(mask: torch.Tensor) -> torch.Tensor:
    """(batch, 1, 1, tokens): 0 for tokens, strongly negative for padding."""
    return (1.0 - mask[:, None, None, :].to(torch.float32)) * _MASKED


def _counted(mask: torch.Tensor) -> torch.Tensor:
    """(batch, tokens): 1 for the first token of a text, and so on, wherever its padding is."""
    return mask.cumsum(1) * mask


def _run_bert(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    embedded = backbone.embeddings(input_ids=ids, token_type_ids=torch.zeros_like(ids))
    result: torch.Tensor = backbone.encoder(embedded, attention_mask=_additive(mask))[0]
    return result


def _run_roberta(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = _counted(mask) + backbone.embeddings.padding_idx
    embedded = backbone.embeddings(input_ids=ids, token_type_ids=torch.zeros_like(ids), position_ids=positions)
    result: torch.Tensor = backbone.encoder(embedded, attention_mask=_additive(mask))[0]
    return result


def _run_mpnet(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = _counted(mask) + backbone.embeddings.padding_idx
    embedded = backbone.embeddings(input_ids=ids, position_ids=positions)
    no_head_mask = [None] * backbone.config.num_hidden_layers
    result: torch.Tensor = backbone.encoder(embedded, attention_mask=_additive(mask), head_mask=no_head_mask)[0]
    return result


def _run_distilbert(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    no_head_mask = [None] * backbone.config.n_layers
    result: torch.Tensor = backbone.transformer(x=backbone.embeddings(ids), attn_mask=mask, head_mask=no_head_mask)[0]
    return result


def _run_modernbert(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (_counted(mask) - 1).clamp(min=0)
    everywhere = _additive(mask)
    # Local layers see so many tokens to either side.
    order = torch.arange(ids.shape[1], device=ids.device)
    far = (order[:, None] - order[None, :]).abs() > backbone.config.local_attention // 2
    nearby = everywhere + far.to(torch.float32)[None, None] * _MASKED
    hidden = backbone.embeddings(input_ids=ids)
    for layer in backbone.layers:
        hidden = layer(hidden, attention_mask=everywhere, sliding_window_mask=nearby, position_ids=positions)[0]
    result: torch.Tensor = backbone.final_norm(hidden)
    return result


def _run_decoder(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (_counted(mask) - 1).clamp(min=0)
    order = torch.arange(ids.shape[1], device=ids.device)
    later = (order[None, :] > order[:, None]).to(torch.float32)
    additive = torch.maximum(later[None, None], 1.0 - mask[:, None, None, :].to(torch.float32)) * _MASKED
    hidden = backbone.embed_tokens(ids)
    rotation = backbone.rotary_emb(hidden, positions)
    for layer in backbone.layers:
        hidden = layer(hidden, attention_mask=additive, position_ids=positions, position_embeddings=rotation)
    result: torch.Tensor = backbone.norm(hidden)
    return result


def _run_nomic(backbone: NomicBert, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = backbone(ids, _additive(mask), (_counted(mask) - 1).clamp(min=0))
    return result


# By the model_type of config.json.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("Bert", _run_bert, "bert.", without_pooler=True),
    "distilbert": Architecture("DistilBert", _run_distilbert, "distilbert."),
    "roberta": Architecture("Roberta", _run_roberta, "roberta.", reserved=2, without_pooler=True),
    "xlm-roberta": Architecture("XLMRoberta", _run_roberta, "roberta.", reserved=2, without_pooler=True),
    # MPNet numbers its positions from 2 on, as RoBERTa does.
    "mpnet": Architecture("MPNet", _run_mpnet, "mpnet.", reserved=2, without_pooler=True),
    "modernbert": Architecture("ModernBert", _run_modernbert, "model."),
    "qwen2": Architecture("Qwen2", _run_decoder, "model.", causal=True),
    "llama": Architecture("Llama", _run_decoder, "model.", causal=True),
}
