"""A real training run, short: the real base weights on a small slice of the real data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edge.agents import load_agents
from export.checkpoint import load_checkpoint
from export.dataset import load_dataset
from export.finetune import finetune
from export.recipe import Commits, Recipe, Split, load_recipe
from tests.conftest import MINI


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Three agents, 40 tasks of each, one epoch."""
    folder = tmp_path_factory.mktemp("recipe")
    mini = load_recipe(MINI / "recipe.toml")
    agents = [a for a in load_agents(MINI / "agents.toml") if a.name in ("tester", "devops", "planner")]
    lines = [json.dumps({"name": a.name, "description": a.description}) for a in agents]
    (folder / "agents.json").write_text("[" + ",".join(lines) + "]")
    (folder / "data").mkdir()
    for agent in agents:
        rows = [json.loads(line) for line in (MINI / "data" / f"{agent.name}.jsonl").read_text("utf-8").splitlines()]
        rows = [json.dumps({"task": row["task"], "agent": row["agent"]}) for row in rows[:40]]
        (folder / "data" / f"{agent.name}.jsonl").write_text("\n".join(rows))
    return replace(
        mini,
        agents="agents.json",
        data=replace(mini.data, tasks=tuple(f"data/{a.name}.jsonl" for a in agents), pairs=(), out_of_scope=()),
        split=Split(dev_percent=25, test_percent=5),
        commits=Commits(),
        train=replace(mini.train, epochs=2, batch_size=16),
        path=folder / "recipe.toml",
    )


def test_training_learns_and_is_reproducible(recipe: Recipe, tmp_path: Path) -> None:
    metrics = finetune(recipe, tmp_path / "first", quiet=True)
    epochs = metrics["epochs"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert epochs[metrics["best_epoch"] - 1]["dev_accuracy"] >= 0.8
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert files >= {
        "model.safetensors",
        "tokenizer.json",
        "config.json",
        "head.safetensors",
        "metrics.json",
        "training.png",
    }
    assert json.loads((tmp_path / "first" / "metrics.json").read_text()) == metrics
    assert {path.name for path in tmp_path.iterdir()} == {"first"}

    checkpoint = load_checkpoint(tmp_path / "first")
    assert checkpoint.head is not None
    names = [agent.name for agent in load_agents(recipe.resolve(recipe.agents))]
    assert checkpoint.head.agents == tuple(names)
    assert metrics["split_sha256"] == load_dataset(recipe, names).digest()

    again = finetune(recipe, tmp_path / "second", quiet=True)
    first, second = ({k: v for k, v in e.items() if k != "seconds"} for e in (epochs[-1], again["epochs"][-1]))
    assert first == pytest.approx(second, abs=1e-3)
    other = load_checkpoint(tmp_path / "second")
    assert other.head is not None
    torch.testing.assert_close(checkpoint.head.prototypes, other.head.prototypes, atol=1e-3, rtol=0)
