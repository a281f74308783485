"""A smaller network made of a larger one's parts, to be trained to imitate it."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import BertConfig, BertModel

from export.checkpoint import Checkpoint
from export.errors import RecipeError
from export.recipe import Student


def shrink(checkpoint: Checkpoint, student: Student, texts: Sequence[str]) -> Checkpoint:
    """A copy with fewer layers, tokens and neurons.

    Dropped tokens fall back to smaller pieces of WordPiece: every single character and special token
    stays.

    Args:
        checkpoint: A BERT with a WordPiece tokenizer.
        student: What to keep.
        texts: Training tasks, whose tokens are counted.

    Raises:
        RecipeError: The base has no such layers or neurons, or is no BERT with WordPiece.
    """
    backbone = checkpoint.backbone
    model = json.loads(checkpoint.tokenizer.to_str())["model"]
    if not isinstance(backbone, BertModel) or model["type"] != "WordPiece":
        raise RecipeError("student: the base must be a BERT with a WordPiece tokenizer. Choose another base.")
    depth = int(backbone.config.num_hidden_layers)
    layers = student.layers or tuple(range(depth))
    if not all(0 <= layer < depth for layer in layers):
        raise RecipeError(f"student: layers must be from 0 to {depth - 1}. Correct the recipe.")
    width = int(backbone.config.intermediate_size)
    inner = student.inner or width
    if not 1 <= inner <= width:
        raise RecipeError(f"student: inner must be from 1 to {width}. Correct the recipe.")
    tokenizer, kept = _tokenizer(checkpoint, student.vocabulary, texts)
    positions = student.positions or int(backbone.config.max_position_embeddings)
    values = backbone.config.to_dict()
    values |= {"num_hidden_layers": len(layers), "vocab_size": len(kept), "max_position_embeddings": positions}
    values |= {"intermediate_size": inner}
    config = BertConfig.from_dict(values)
    config._attn_implementation = "eager"
    small = BertModel(config, add_pooling_layer=False)  # type: ignore[no-untyped-call]
    state = {name: value.detach().clone() for name, value in backbone.embeddings.state_dict().items()}
    state["word_embeddings.weight"] = state["word_embeddings.weight"][torch.tensor(kept)]
    state["position_embeddings.weight"] = state["position_embeddings.weight"][:positions]
    small.embeddings.load_state_dict(state)
    small.encoder.layer = nn.ModuleList([_narrowed(backbone.encoder.layer[layer], inner) for layer in layers])
    small.eval()  # type: ignore[no-untyped-call]
    limit = min(checkpoint.max_length, positions)
    return replace(checkpoint, backbone=small, tokenizer=tokenizer, max_length=limit)


def _narrowed(layer: nn.Module, inner: int) -> nn.Module:
    """A copy of a BERT layer with the ``inner`` feed-forward neurons of the largest weights in and out."""
    narrow = copy.deepcopy(layer)
    up, down = narrow.get_submodule("intermediate.dense"), narrow.get_submodule("output.dense")
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    weight_of = up.weight.detach().norm(dim=1) * down.weight.detach().norm(dim=0)
    kept = weight_of.topk(inner).indices.sort().values
    with torch.no_grad():
        up.weight, up.bias = nn.Parameter(up.weight[kept]), nn.Parameter(up.bias[kept])
        down.weight = nn.Parameter(down.weight[:, kept])
    up.out_features = down.in_features = inner
    return narrow


def _tokenizer(checkpoint: Checkpoint, size: int, texts: Sequence[str]) -> tuple[Tokenizer, list[int]]:
    """The tokenizer with its ``size`` most useful tokens, and their former ids."""
    document = json.loads(checkpoint.tokenizer.to_str())
    vocabulary: dict[str, int] = document["model"]["vocab"]
    if size <= 0 or size >= len(vocabulary):
        return checkpoint.tokenizer, list(range(len(vocabulary)))
    counts = Counter(token for row in checkpoint.tokenize(list(texts)) for token in row)
    special = {token["id"] for token in document["added_tokens"]}
    single = {i for token, i in vocabulary.items() if len(token.removeprefix("##")) == 1 and token.isascii()}
    # Among tokens that never occur here the lower id goes first: WordPiece orders by frequency.
    ranked = sorted(vocabulary.values(), key=lambda i: (i not in special, i not in single, -counts[i], i))
    kept = sorted(ranked[:size])
    position = {old: new for new, old in enumerate(kept)}
    document["model"]["vocab"] = {token: position[i] for token, i in vocabulary.items() if i in position}
    for token in document["added_tokens"]:
        token["id"] = position[token["id"]]
    for token in document["post_processor"].get("special_tokens", {}).values():
        token["ids"] = [position[i] for i in token["ids"]]
    return Tokenizer.from_str(json.dumps(document)), kept
