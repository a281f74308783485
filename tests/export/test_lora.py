"""LoRA on small random Qwen2 networks: trained, merged, resumed, saved, exported; on the CPU throughout."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from edge import Bundle, Encoder, Generator, Router
from edge.agents import load_agents
from export import lora
from export.checkpoint import load_checkpoint
from export.cli import main
from export.errors import RecipeError
from export.finetune import _Judged, _losses, _Network, _parameter_groups, _reward, _rows, finetune
from export.plan import plan_recipe
from export.recipe import Lora, Recipe, Train, load_recipe
from export.wrapper import embed, forward
from tests.conftest import MINI, ROOT
from tests.export.test_finetune import kill_after_an_epoch
from tests.export.test_gguf import byte_level, write

CHOSEN = ("tester", "devops", "planner")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = ("q_proj", "v_proj", "down_proj")
TEXTS = ["Write tests for the parser", "Deploy", "Plan the next release of the mobile app, week by week"]
RECIPE = """
name = "tiny"
version = "0"
licence = "Apache-2.0"
base = "base"
base_model = "none"
agents = "agents.json"

[data]
tasks = ["tester.jsonl", "devops.jsonl", "planner.jsonl"]

[split]
dev_percent = 25.0
test_percent = 5.0

[train]
epochs = 3
batch_size = 16
learning_rate = 1e-2
max_tokens = 16
seed = 7

[lora]
rank = 4
alpha = 8.0
dropout = 0.1
targets = ["q_proj", "v_proj", "down_proj"]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A random language model with an output layer of its own, three agents, 30 tasks of each."""
    folder = tmp_path_factory.mktemp("lora")
    tokenizer, tokens, _ = byte_level()
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=False,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    agents = [agent for agent in load_agents(MINI / "agents.toml") if agent.name in CHOSEN]
    described = [{"name": agent.name, "description": agent.description} for agent in agents]
    (folder / "agents.json").write_text(json.dumps(described))
    for name in CHOSEN:
        rows = [json.loads(line) for line in (MINI / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()[:30]]
        lines = [json.dumps({"task": row["task"], "agent": row["agent"]}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "recipe.toml").write_text(RECIPE)
    return load_recipe(folder / "recipe.toml")


@pytest.fixture(scope="module")
def trained(recipe: Recipe) -> Path:
    """A checkpoint that the command line made."""
    out = recipe.path.parent / "trained"
    assert main(["finetune", str(recipe.path), "--out", str(out), "--quiet"]) == 0
    return out


def is_target(name: str) -> bool:
    return name.endswith(tuple(f"{target}.weight" for target in TARGETS))


def test_adapters_alone_lower_the_loss_and_change_their_targets_alone(recipe: Recipe, tmp_path: Path) -> None:
    settings = replace(recipe.train, head_learning_rate=0.0)
    plan = plan_recipe(replace(recipe, train=settings))
    metrics = finetune(plan, tmp_path / "out", quiet=True)
    losses = [epoch["loss"] for epoch in metrics["epochs"]]
    assert losses[-1] < 0.95 * losses[0]
    assert (metrics["lora"]["rank"], metrics["device"]) == (4, "cpu")
    before, after = load_checkpoint(recipe.base_path()), plan.start.backbone.state_dict()
    assert before.backbone.state_dict().keys() == after.keys()
    for name, value in before.backbone.state_dict().items():
        assert torch.equal(value, after[name]) != is_target(name), name
    assert not hasattr(plan.start.backbone, "peft_config")
    assert all(parameter.requires_grad for parameter in plan.start.backbone.parameters())


def test_merged_weights_give_the_adapted_networks_vectors(recipe: Recipe) -> None:
    checkpoint, untouched = load_checkpoint(recipe.base_path()), load_checkpoint(recipe.base_path())
    ids = checkpoint.tokenize(TEXTS)
    model = checkpoint.encoder()
    plain = embed(model, ids)
    torch.manual_seed(1)
    lora.attach(checkpoint.backbone, Lora(rank=4, alpha=8.0, targets=EVERY))
    assert torch.equal(embed(model, ids), plain)
    learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(learning) == 2 * 2 * len(EVERY)
    assert all("lora_" in name for name in learning)
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        torch.autograd.backward((forward(model, ids) @ plain.T).square().mean())
        optimizer.step()
    adapted = embed(model, ids)
    assert float((adapted - plain).abs().max()) > 1e-2
    state = checkpoint.backbone.state_dict()
    for name, value in untouched.backbone.state_dict().items():
        owner, _, kind = name.rpartition(".")
        below = f"{owner}.base_layer.{kind}" if owner.endswith(EVERY) else name
        assert torch.equal(state[below], value), name
    lora.merge(checkpoint.backbone)
    torch.testing.assert_close(embed(model, ids), adapted, atol=1e-5, rtol=0)
    assert type(checkpoint.backbone.layers[0].mlp.up_proj) is nn.Linear


def test_a_killed_run_goes_on_with_its_adapters_alone(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe.path.with_name("longer.toml")
    path.write_text(RECIPE.replace("epochs = 3", "epochs = 6\naverage = 0.9"))
    whole = finetune(plan_recipe(load_recipe(path)), tmp_path / "whole", quiet=True)

    out = tmp_path / "killed"
    command = [sys.executable, "-m", "export.cli", "finetune", str(path), "--out", str(out), "--quiet"]
    note = kill_after_an_epoch(command, out)
    done = json.loads(note.read_text())["epochs"]
    assert 1 <= len(done) < 6
    state = load_file(note.with_name("state.safetensors"))
    counted: dict[str, int] = {}
    for name, value in state.items():
        kind = name.split(".")[0]
        counted[kind] = counted.get(kind, 0) + value.numel()
        assert kind in ("optimizer", "random") or "lora_" in name or name.endswith(("prototypes", "n_averaged")), name
    tensors = 2 * 2 * len(TARGETS) + 1  # two an adapter, and the prototypes
    assert counted["network"] == counted["best"] == counted["average"] - 1
    assert counted["optimizer"] == 2 * counted["network"] + tensors  # two moments, and a step of each tensor
    assert (
        counted["network"]
        < sum(value.numel() for value in load_file(recipe.base_path() / "model.safetensors").values()) / 5
    )

    resumed = finetune(plan_recipe(load_recipe(path)), out, quiet=True)
    for first, second in zip(whole["epochs"], resumed["epochs"], strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds"}:
            assert first[key] == pytest.approx(second[key], abs=1e-4), key
    for part in ("model.safetensors", "head.safetensors"):
        one, other = load_file(tmp_path / "whole" / part), load_file(out / part)
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], atol=1e-3, rtol=0)
    assert not note.parent.exists()


def test_every_option_goes_with_adapters(recipe: Recipe, tmp_path: Path) -> None:
    settings = replace(
        recipe.train,
        epochs=1,
        precision="bfloat16",
        layer_decay=0.9,
        in_batch_negatives=True,
        hard_negatives=True,
        retention_weight=1.0,
        imitation_weight=0.1,
        average=0.5,
        heads=("prototypes-2", "linear"),
    )
    metrics = finetune(plan_recipe(replace(recipe, train=settings)), tmp_path / "out", quiet=True)
    assert all(math.isfinite(value) for value in metrics["epochs"][0].values())
    assert metrics["heads"].keys() == {"prototypes-1", "prototypes-2", "linear"}
    assert load_checkpoint(tmp_path / "out").head is not None


def test_a_decoders_rates_fall_from_layer_to_layer(recipe: Recipe) -> None:
    checkpoint = load_checkpoint(recipe.base_path())
    network = _Network(checkpoint.encoder(), torch.zeros(4, 32))
    rate_of = {
        id(parameter): group["lr"]
        for group in _parameter_groups(network, Train(learning_rate=1.0, layer_decay=0.5, head_learning_rate=3.0))
        for parameter in group["params"]
    }
    assert rate_of.keys() == set(map(id, network.parameters()))
    layers = checkpoint.backbone.layers
    found = [rate_of[id(p)] for p in (checkpoint.backbone.embed_tokens.weight, *(x.mlp.up_proj.weight for x in layers))]
    assert found == [0.25, 0.5, 1.0]
    assert rate_of[id(network.prototypes)] == 3.0


def test_the_checkpoint_is_a_whole_language_model_and_becomes_a_bundle(
    recipe: Recipe, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, checkpoint = load_checkpoint(recipe.base_path()), load_checkpoint(trained, longest=4096)
    assert checkpoint.language_model is not None
    assert checkpoint.max_length == 4096
    assert torch.equal(checkpoint.language_model.lm_head.weight, base.language_model.lm_head.weight.half().float())
    ids = torch.tensor(checkpoint.tokenize(TEXTS[:1]))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(theirs, checkpoint.language_model(input_ids=ids).logits, atol=1e-4, rtol=0)
    arguments = ["--recipe", str(recipe.path), "--task", "embed,generate", "--variants", "fp32", "--quiet"]
    assert main(["bundle", str(trained), "--out", str(tmp_path / "bundle"), *arguments]) == 0, capsys.readouterr().err
    bundle = Bundle.open(tmp_path / "bundle")
    assert (bundle.encoder.pooling, bundle.encoder.dim) == ("last", 32)
    vectors = embed(checkpoint.encoder(), checkpoint.tokenize(TEXTS)).numpy()
    np.testing.assert_allclose(Encoder.load(bundle).encode(TEXTS), vectors, atol=1e-4)
    assert Router.load(bundle).route(TEXTS[0]).ranking
    assert [generator.id for generator in bundle.generators] == ["fp32"]
    assert Generator.load(bundle).generate("Route: Add tests\nAgent:", 4)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_gguf_file_is_a_base_too(recipe: Recipe, tmp_path: Path, rank: int) -> None:
    """Its output layer is its embedding, and stays so."""
    path = tmp_path / "base.gguf"
    write(path, "qwen2")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = replace(recipe.train, epochs=1, learning_rate=1e-3)
    based = replace(recipe, base=str(path), base_sha256=digest, train=settings, lora=Lora(rank=rank))
    plan = plan_recipe(based)
    finetune(plan, tmp_path / "out", quiet=True)
    again = load_checkpoint(tmp_path / "out")
    assert again.language_model is not None
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    before, vectors = (embed(c.encoder(), c.tokenize(TEXTS)) for c in (load_checkpoint(path), again))
    assert float((vectors * embed(plan.start.encoder(), again.tokenize(TEXTS))).sum(1).min()) > 0.9999
    assert float((before * vectors).sum(1).min()) < 0.9999
    changed = [
        n
        for n, v in load_checkpoint(path).backbone.state_dict().items()
        if not torch.equal(v, plan.start.backbone.state_dict()[n])
    ]
    assert ("embed_tokens.weight" in changed) == (rank == 0)
    with pytest.raises(RecipeError, match="is not the recipe's"):
        replace(based, base_sha256="0" * 64).base_path()
    with pytest.raises(RecipeError, match=r"has no file .*none\.gguf\. Put it there"):
        replace(based, base="none.gguf").base_path()
    write(tmp_path / "nomic.gguf", "nomic-bert")
    with pytest.raises(RecipeError, match="nomic-bert"):
        finetune(plan_recipe(replace(based, base=str(tmp_path / "nomic.gguf"), base_sha256="")), tmp_path / "x")


class Rotary(nn.Module):
    """In the stead of the network's own, which enters an autocast that torch does not have on its device "meta"."""

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, :, None] * torch.ones(16, device=hidden.device)
        return angles.cos(), angles.sin()


def test_all_tensors_of_a_step_are_where_the_network_is(recipe: Recipe) -> None:
    """On "meta", whose tensors have no values: most operations on tensors of two devices are refused."""
    settings = replace(
        recipe.train, in_batch_negatives=True, retention_weight=1.0, imitation_weight=1.0, soft_weight=1.0
    )
    plan = plan_recipe(recipe)
    rows = _rows(replace(plan, settings=settings), list(plan.dataset.train), True)
    lora.attach(plan.start.backbone, Lora(rank=2))
    plan.start.backbone.rotary_emb = Rotary()
    network = _Network(plan.start.encoder(), torch.zeros(4, 32)).to("meta").train()
    index = torch.tensor([0, 3, 5])
    terms = _losses(network, rows, index, settings)
    assert terms.keys() == {"infonce", "triplet", "retention", "imitation", "soft"}
    judged = _Judged(rows.ids[:5], torch.zeros(5, 3))
    loss = torch.stack([*terms.values(), _reward(network, judged, 0, settings)]).sum()
    torch.autograd.backward(loss)
    assert loss.device.type == "meta"
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert {parameter.grad.device.type for parameter in learning if parameter.grad is not None} == {"meta"}
    assert all(parameter.grad is not None for parameter in learning)


def test_a_device_that_is_not_there_is_named(recipe: Recipe, tmp_path: Path) -> None:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for device in (name for name, available in there.items() if not available):
        settings = replace(recipe.train, device=device)
        with pytest.raises(RecipeError, match=rf"no device '{device}' here\. Install"):
            finetune(plan_recipe(replace(recipe, train=settings)), tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_targets_that_the_network_lacks_are_named_with_those_it_has(recipe: Recipe, tmp_path: Path) -> None:
    wrong = replace(recipe, lora=Lora(rank=2, targets=("query", "q_proj", "embed_tokens")))
    with pytest.raises(RecipeError, match="named query, embed_tokens") as error:
        finetune(plan_recipe(wrong), tmp_path / "out", quiet=True)
    assert str(error.value).endswith(f"Use some of: {', '.join(EVERY)}.")


def test_an_adapter_that_diverged_is_not_merged(recipe: Recipe) -> None:
    checkpoint = load_checkpoint(recipe.base_path())
    lora.attach(checkpoint.backbone, Lora(rank=2, targets=("up_proj",)))
    with torch.no_grad():
        checkpoint.backbone.layers[1].mlp.up_proj.lora_B["default"].weight.fill_(torch.nan)
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.up_proj .* lower learning_rate"):
        lora.merge(checkpoint.backbone)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("rank = 4", "rank = -1"), "rank must be at least 0, not -1"),
        (lambda text: text.replace("alpha = 8.0", "alpha = 0"), "alpha must be above 0"),
        (lambda text: text.replace("alpha = 8.0", "alpha = inf"), "alpha must be above 0"),
        (lambda text: text.replace("dropout = 0.1", "dropout = 1.0"), "dropout must be from 0"),
        (lambda text: text.replace("dropout = 0.1", "dropout = nan"), "dropout must be from 0"),
        (lambda text: text.replace('["q_proj", "v_proj", "down_proj"]', "[]"), "names no targets"),
        (lambda text: text.replace("rank = 4", "rank = 4.0"), "rank must be of type int"),
        (lambda text: text.replace("[train]", '[train]\ndevice = "tpu"'), "device must be one of auto, cuda, mps, cpu"),
    ],
)
def test_broken_settings_are_named(tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    (tmp_path / "recipe.toml").write_text(change(RECIPE))
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / "recipe.toml")


def test_the_shipped_recipe_is_the_origins() -> None:
    path = ROOT / "models" / "ruvltra-0.5b" / "recipe.toml"
    recipe, mini = load_recipe(path), load_recipe(MINI / "recipe.toml")
    train = recipe.train
    assert (train.learning_rate, train.batch_size, train.epochs, train.weight_decay) == (2e-5, 32, 30, 0.01)
    assert (train.margin, train.temperature) == (0.5, 0.07)
    assert min(train.triplet_weight, train.infonce_weight) > 0
    assert max(train.soft_weight, train.reward_weight, train.retention_weight, train.imitation_weight) == 0
    assert recipe.lora == Lora(rank=16, alpha=32.0, dropout=0.05, targets=EVERY)
    assert (train.max_tokens, train.precision, train.warmup, train.device) == (96, "bfloat16", 0.06, "auto")
    assert (recipe.split, recipe.commits.weight) == (mini.split, 0.0)
    assert [recipe.resolve(name).resolve() for name in recipe.data.tasks] == [
        mini.resolve(name).resolve() for name in mini.data.tasks
    ]
