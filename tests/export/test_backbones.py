"""Every architecture, small and with random weights: run as transformers runs it, and exported to one graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from export.backbones import ARCHITECTURES, Backbone, hidden_states
from export.decoder import is_decoder
from export.nomic import NomicBert, NomicBertConfig
from export.onnx import INPUTS, export_fp32
from export.wrapper import POOLING, SentenceEncoder

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 66,
}
MORE: dict[str, dict[str, Any]] = {
    "modernbert": {"local_attention": 4, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    "qwen2": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "mpnet": {"pad_token_id": 1},
    "distilbert": {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128},
}
ABSOLUTE = ("bert", "distilbert")  # number positions from the left, whatever the mask says


def network(kind: str, more: Mapping[str, str] = MappingProxyType({})) -> Backbone:
    torch.manual_seed(3)
    if kind == "nomic-bert":
        return NomicBert(NomicBertConfig(100, 64, 3, 4, 128, 66, 1e-12, 1000.0)).eval()
    architecture = ARCHITECTURES[kind]
    with warnings.catch_warnings():  # importing ModernBERT compiles, with tools that torch has deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        values = SIZES | MORE.get(kind, {}) | dict(more) | {"model_type": kind}
        return architecture.make(architecture.config(values)).eval()


def batch(padding: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 100, (3, 13), generator=generator)
    lengths = torch.tensor([[13], [7], [3]])
    order = torch.arange(13)[None]
    mask = (order < lengths if side == "right" else order >= 13 - lengths).long()
    tokens = [row[:n] for row, n in zip(ids, lengths[:, 0].tolist(), strict=True)]
    result = torch.full_like(ids, padding)
    for row, (values, where) in enumerate(zip(tokens, mask, strict=True)):
        result[row, where.bool()] = values
    return result, mask


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
@torch.no_grad()
def test_runs_as_transformers_does(kind: str) -> None:
    backbone = network(kind)
    ids, mask = batch(backbone.config.pad_token_id or 0)
    expected = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    found = hidden_states(backbone, ids, mask)
    assert float(((found - expected).abs() * mask[..., None]).max()) < 1e-5


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "nomic-bert"])
@torch.no_grad()
def test_the_side_of_the_padding_does_not_matter_where_positions_follow_the_mask(kind: str) -> None:
    backbone = network(kind)
    right, left = (batch(getattr(backbone.config, "pad_token_id", None) or 0, side) for side in ("right", "left"))
    for mode in POOLING:
        model = SentenceEncoder(backbone, (mode,))
        difference = float((model(*right) - model(*left)).abs().max())
        assert difference < 1e-5 or kind in ABSOLUTE, mode


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *((kind, {}) for kind in [*ARCHITECTURES, "nomic-bert"]),
        # Activations without a fused operator.
        ("bert", {"hidden_act": "gelu_new"}),
        ("roberta", {"hidden_act": "relu"}),
        ("distilbert", {"activation": "relu"}),
        ("modernbert", {"hidden_activation": "silu"}),
        ("llama", {"hidden_act": "gelu"}),
    ],
    ids=str,
)
def test_one_graph_of_any_shape(kind: str, more: dict[str, str], tmp_path: Path) -> None:
    """Fused as far as the exporter promises (it raises otherwise), and equal to the network."""
    backbone = network(kind, more)
    causal = kind in ARCHITECTURES and ARCHITECTURES[kind].causal
    model = SentenceEncoder(backbone, ("lasttoken" if causal else "mean",)).eval()
    path = tmp_path / "model.fp32.onnx"
    export_fp32(model, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(5)
    shapes = [torch.randint(5, 100, shape, generator=generator) for shape in ((1, 1), (1, 2), (8, 13), (1, 60))]
    padding = getattr(backbone.config, "pad_token_id", None) or 0
    cases = [(ids, torch.ones_like(ids)) for ids in shapes]
    right_only = kind in ABSOLUTE or is_decoder(model)
    cases += [batch(padding, side) for side in (("right",) if right_only else ("right", "left"))]
    for ids, mask in cases:
        with torch.no_grad():
            expected = model(ids, mask).numpy()
        found = session.run(None, dict(zip(INPUTS, (ids.numpy(), mask.numpy()), strict=True)))[0]
        assert float((expected * found).sum(1).min()) > 0.999999
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    if is_decoder(model):  # refused by the runtime, which wants unit vectors
        ids, mask = batch(padding, "left")
        found = session.run(None, dict(zip(INPUTS, (ids.numpy(), mask.numpy()), strict=True)))[0]
        begun = (mask[:, 0] == 1).numpy()
        assert not begun.all()
        assert not found[~begun].any()
        np.testing.assert_allclose(np.linalg.norm(found[begun], axis=1), 1, atol=1e-5)
