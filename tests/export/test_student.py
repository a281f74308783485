"""Smaller networks, soft labels, variations, and bundles turned back into checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edge.agents import load_agents
from edge.bundle import Bundle
from export.bundle import Identity, build_bundle
from export.checkpoint import Checkpoint, Head, load_checkpoint, save_checkpoint
from export.errors import CheckpointError, RecipeError
from export.recipe import Student
from export.soft_labels import read_soft_labels, write_soft_labels
from export.student import shrink
from export.unpack import unpack_bundle
from export.variations import variations
from tests.conftest import MINI

TASKS = ["Fix the crash in the parser", "write a guide for new hires", "speed up the nightly import of orders"]
AGENTS = load_agents(MINI / "agents.toml")
NAMES = [agent.name for agent in AGENTS]


def embed(checkpoint: Checkpoint, text: str) -> torch.Tensor:
    ids = torch.tensor(checkpoint.tokenize([text]))
    with torch.no_grad():
        vector: torch.Tensor = checkpoint.encoder().eval()(ids, torch.ones_like(ids))[0]
    return vector


@pytest.fixture(scope="module")
def with_head(minilm: Checkpoint) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(14, minilm.dim, generator=generator), dim=1)
    return replace(minilm, head=Head(tuple(NAMES), rows[:-1, None], rows[-1]))


def test_keeping_all_layers_and_all_needed_tokens_changes_nothing(minilm: Checkpoint) -> None:
    small = shrink(minilm, Student(layers=tuple(range(6)), vocabulary=2000), TASKS)
    assert small.tokenizer.get_vocab_size() == small.backbone.config.vocab_size == 2000
    for task in TASKS:
        torch.testing.assert_close(embed(small, task), embed(minilm, task), atol=1e-5, rtol=0)
        assert [small.tokenizer.id_to_token(i) for i in small.tokenize([task])[0]] == [
            minilm.tokenizer.id_to_token(i) for i in minilm.tokenize([task])[0]
        ]


def test_fewer_layers_and_unknown_words_still_make_unit_vectors(minilm: Checkpoint) -> None:
    small = shrink(minilm, Student(layers=(0, 3), vocabulary=1500, positions=32), TASKS)
    assert small.backbone.config.num_hidden_layers == 2
    assert small.max_length == 32
    assert len(small.tokenize([" ".join(["word"] * 100)])[0]) == 32
    rare = "kubernetes zookeeper xylophone"
    assert len(small.tokenize([rare])[0]) > len(minilm.tokenize([rare])[0])
    assert small.tokenizer.token_to_id("[UNK]") not in small.tokenize([rare])[0]
    assert float(embed(small, rare).norm()) == pytest.approx(1, abs=1e-5)
    before = embed(minilm, TASKS[0])
    torch.nn.init.zeros_(small.backbone.encoder.layer[0].output.dense.weight)
    torch.testing.assert_close(embed(minilm, TASKS[0]), before)  # the student has weights of its own


def test_fewer_neurons_keep_the_weightiest(minilm: Checkpoint) -> None:
    small = shrink(minilm, Student(layers=(0, 1), inner=512), TASKS)
    assert small.backbone.config.intermediate_size == 512
    layer = small.backbone.get_submodule("encoder.layer.1")
    before = minilm.backbone.get_submodule("encoder.layer.1")
    up, down = (before.get_submodule(name).weight.detach() for name in ("intermediate.dense", "output.dense"))
    assert isinstance(up, torch.Tensor)
    assert isinstance(down, torch.Tensor)
    weightiest = (up.norm(dim=1) * down.norm(dim=0)).topk(512).indices.sort().values
    torch.testing.assert_close(layer.get_submodule("intermediate.dense").weight, up[weightiest])
    torch.testing.assert_close(layer.get_submodule("output.dense").weight, down[:, weightiest])
    assert float(embed(small, TASKS[0]).norm()) == pytest.approx(1, abs=1e-5)
    # All of them change nothing, and a whole bundle of few can be made.
    every = shrink(minilm, Student(layers=tuple(range(6)), inner=1536), TASKS)
    torch.testing.assert_close(embed(every, TASKS[0]), embed(minilm, TASKS[0]), atol=1e-5, rtol=0)


def test_layers_and_neurons_that_are_not_there_are_an_error(minilm: Checkpoint) -> None:
    with pytest.raises(RecipeError, match="0 to 5"):
        shrink(minilm, Student(layers=(0, 6)), TASKS)
    with pytest.raises(RecipeError, match="1 to 1536"):
        shrink(minilm, Student(inner=1537), TASKS)


def test_soft_labels_are_the_teachers_probabilities(with_head: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "soft.safetensors"
    assert write_soft_labels(path, with_head, [*TASKS, TASKS[0]], 0.07, quiet=True) == 3
    found = read_soft_labels(path, NAMES, [*TASKS, "never asked about"])
    assert set(found) == set(TASKS)
    assert with_head.head is not None
    rows = torch.cat([with_head.head.prototypes[:, 0], with_head.head.out_of_scope[None]])
    for task in TASKS:
        expected = (rows @ embed(with_head, task) / 0.07).softmax(0)
        torch.testing.assert_close(found[task], expected, atol=0.03, rtol=0)  # bfloat16 and 8 bits
    assert TASKS[0].encode() not in path.read_bytes()
    with pytest.raises(RecipeError, match="agents"):
        read_soft_labels(path, NAMES[::-1], TASKS)
    with pytest.raises(RecipeError, match="none of the recipe's tasks"):
        read_soft_labels(path, NAMES, ["something else"])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RecipeError, match="soft-labels"):
        read_soft_labels(path, NAMES, TASKS)


def test_a_teacher_needs_a_head(minilm: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no trained head"):
        write_soft_labels(tmp_path / "soft", replace(minilm, head=None), TASKS, 0.07)


def test_variations_are_new_texts_of_known_words_and_the_same_each_time() -> None:
    made = variations([*TASKS, "fix it"], 20, seed=3)
    assert made == variations([*TASKS, "fix it"], 20, seed=3) != variations([*TASKS, "fix it"], 20, seed=4)
    assert len(made) == len(set(made)) > 20
    assert {word for text in made for word in text.split()} <= {word for text in TASKS for word in text.split()}
    assert variations(TASKS, 0, seed=3) == []


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_bundle_becomes_the_checkpoint_it_was_made_of(variant: str, with_head: Checkpoint, tmp_path: Path) -> None:
    assert with_head.head is not None
    save_checkpoint(tmp_path / "checkpoint", with_head, with_head.head)
    identity = Identity("x", "1", "Apache-2.0", "x")
    build_bundle(
        load_checkpoint(tmp_path / "checkpoint"),
        tmp_path / "bundle",
        identity=identity,
        agents=AGENTS,
        variants=[variant],
        quiet=True,
    )
    rebuilt = unpack_bundle(tmp_path / "bundle")
    lowest = min(float(embed(rebuilt, task) @ embed(with_head, task)) for task in TASKS)
    assert lowest > (0.99999 if variant == "fp32" else 0.99)
    assert rebuilt.head is not None
    assert rebuilt.head.agents == tuple(NAMES)
    torch.testing.assert_close(rebuilt.head.prototypes, with_head.head.prototypes, atol=1e-6, rtol=0)
    assert rebuilt.backbone.config.num_attention_heads == 12


def test_the_shipped_bundle_can_be_trained_on() -> None:
    checkpoint = unpack_bundle(MINI / "bundle")
    assert checkpoint.head is not None
    assert checkpoint.max_length == Bundle.open().encoder.max_length
