from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import BertConfig, BertModel

from export.ane import AneEncoder
from export.checkpoint import Checkpoint
from export.errors import CheckpointError
from tests.export.conftest import MINILM

PADDING = 0


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    """A random BERT: two layers, four heads, with biases and norms that are not at their start."""
    generator = torch.Generator().manual_seed(5)
    config = BertConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        pad_token_id=PADDING,
    )
    config._attn_implementation = "eager"
    network = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.2 * noise if "LayerNorm.weight" in name else 0.2 * noise)
    return Checkpoint(MINILM, network, Tokenizer(models.WordLevel({"a": 1}, unk_token="a")), 128, None)


def padded(lengths: list[int], tokens: int, vocabulary: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their mask, each row filled to its length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocabulary, (len(lengths), tokens), generator=generator)
    mask = (torch.arange(tokens)[None, :] < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def lowest_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double(), b.double()).min())


class TestAneEncoder:
    @pytest.mark.parametrize("which", ["small", "minilm"])
    def test_equals_the_encoder(self, which: str, request: pytest.FixtureRequest) -> None:
        checkpoint: Checkpoint = request.getfixturevalue(which)
        ids, mask = padded([1, 2, 31, 32], 32)
        with torch.no_grad():
            expected = checkpoint.encoder()(ids, mask)
            network = AneEncoder.of(checkpoint)
            vectors = torch.cat([network(row[None].int()) for row in ids])
        assert vectors.shape == expected.shape
        assert lowest_cosine(vectors, expected) >= 0.99999
        assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-4)

    def test_padding_changes_nothing(self, small: Checkpoint) -> None:
        ids, _ = padded([9], 9)
        network = AneEncoder.of(small)
        with torch.no_grad():
            alone, among = network(ids), network(nn.functional.pad(ids, (0, 55), value=PADDING))
        assert torch.allclose(alone, among, atol=1e-6)

    def test_every_tensor_must_have_a_place(self, small: Checkpoint) -> None:
        with_pooler = BertModel(small.backbone.config)
        with pytest.raises(CheckpointError, match=r"without a place \['pooler\.dense\.weight'"):
            AneEncoder.of(replace(small, backbone=with_pooler))
        fewer = BertModel(small.backbone.config, add_pooling_layer=False)
        del fewer.encoder.layer[1].output.LayerNorm.bias
        with pytest.raises(CheckpointError, match=r"missing \['layers\.1\.output_norm\.bias'\]"):
            AneEncoder.of(replace(small, backbone=fewer))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"pooling": ("cls",)}, "the pooling cls"),
            ({"pooling": ("mean", "max")}, "the pooling mean, max"),
            ({"dense": (nn.Linear(64, 8),)}, "dense layers"),
        ],
    )
    def test_other_kinds_are_refused(self, small: Checkpoint, change: dict[str, object], says: str) -> None:
        with pytest.raises(CheckpointError, match=says):
            AneEncoder.of(replace(small, **change))
