from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edge.agents import load_agents
from export.cli import main
from export.dataset import Dataset, load_commits, load_dataset, normalise
from export.errors import RecipeError
from export.recipe import Commits, Data, Recipe, Split, load_recipe
from tests.conftest import MINI

NAMES = [agent.name for agent in load_agents(MINI / "agents.toml")]


@pytest.fixture(scope="module")
def mini() -> Recipe:
    return load_recipe(MINI / "recipe.toml")


@pytest.fixture(scope="module")
def dataset(mini: Recipe) -> Dataset:
    return load_dataset(mini, NAMES)


def small(folder: Path, rows: list[dict[str, object]], **split: object) -> Recipe:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        name="small",
        version="0",
        licence="x",
        base="x",
        base_model="x",
        agents="x",
        data=Data(tasks=("rows.jsonl",)),
        split=Split(**split),  # type: ignore[arg-type]
        path=folder / "recipe.toml",
    )


def test_shipped_partition_is_the_recipes(mini: Recipe, dataset: Dataset) -> None:
    assert dataset.digest() == mini.split.sha256
    for part in ("dev", "test"):
        lines = (MINI / "splits" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [(row["task"], row["agent"]) for row in map(json.loads, lines)]
        assert rows == [(e.task, e.agent) for e in getattr(dataset, part)]


def test_parts_do_not_overlap_and_have_every_agent(dataset: Dataset) -> None:
    texts = {part: {normalise(e.task) for e in getattr(dataset, part)} for part in ("train", "dev", "test")}
    assert not texts["train"] & texts["dev"]
    assert not texts["train"] & texts["test"]
    assert not texts["dev"] & texts["test"]
    for part in ("dev", "test"):
        counts = {name: sum(e.agent == name for e in getattr(dataset, part)) for name in [*NAMES, "none"]}
        assert min(counts.values()) >= 25, counts


def test_near_duplicates_stay_together(dataset: Dataset) -> None:
    train = [frozenset(normalise(e.task).split()) for e in dataset.train]
    for example in dataset.dev[:200]:
        tokens = frozenset(normalise(example.task).split())
        assert all(len(tokens & other) < 0.6 * len(tokens | other) for other in train), example.task


def test_order_of_the_lines_does_not_matter(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"task": f"task {i} about {i * 7919 % 101}", "agent": "coder"} for i in range(200)]
    first = load_dataset(small(tmp_path, rows), NAMES)
    second = load_dataset(small(tmp_path, rows[::-1]), NAMES)
    assert first.digest() == second.digest()
    assert len(first.dev) > 5
    more = load_dataset(small(tmp_path, [*rows, {"task": "something else altogether", "agent": "tester"}]), NAMES)
    assert {e.task for e in first.dev} <= {e.task for e in more.dev}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"task": "a b c", "agent": "coder"}, {"task": "A, b: C!", "agent": "tester"}], "labelled both"),
        ([{"task": "", "agent": "coder"}], ":1: no text"),
        ([{"task": "x", "agent": "coder"}, {"task": "y", "agent": "cook"}], ":2: agent 'cook' is not one of"),
        ([{"task": "x", "agent": "coder", "near": "cook"}], ":1: 'near' names 'cook'"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, rows: list[dict[str, object]], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_dataset(small(tmp_path, rows), NAMES)


def test_a_changed_partition_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="state the new digest"):
        load_dataset(small(tmp_path, [{"task": "x", "agent": "coder"}], sha256="0" * 64), NAMES)


def test_commit_subjects_never_repeat_held_out_tasks(tmp_path: Path, mini: Recipe, dataset: Dataset) -> None:
    path = tmp_path / "commits.jsonl"
    rows = [{"task": dataset.dev[0].task.upper(), "agent": "coder"}, {"task": "Add a thing", "agent": "coder"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [path] * len(mini.commits.sha256)
    with pytest.raises(RecipeError, match="is not the recipe's"):
        load_commits(files, mini, NAMES, dataset)
    with pytest.raises(RecipeError, match="were given"):
        load_commits([*files, path], mini, NAMES, dataset)
    recipe = replace(mini, commits=Commits(weight=0.5))
    commits = load_commits([path, path], recipe, NAMES, dataset)
    assert [(e.task, e.weight) for e in commits] == [("Add a thing", 0.5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = 3", "name must be of type str"),
        ('nam = "x"', "unknown key 'nam'"),
        ('name = "x"', "the key 'version' is missing"),
        ("[train]\nepochs = 1.5", "train: epochs must be of type int"),
        ("[train]\nepoch = 1", "unknown key 'epoch'"),
        ("[data]\ntasks = 'x'", "tasks must be a list of strings"),
        ("train = 3", "train must be a table"),
        ("name = ", "not valid TOML"),
    ],
)
def test_broken_recipes_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words) as error:
        load_recipe(path)
    assert str(error.value).startswith(str(path))


def test_missing_recipe_and_missing_base(tmp_path: Path, mini: Recipe) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match=r"pip install 'ruvltra-edge\[train\]'"):
        replace(mini, base="package:no_such_package/model").base_path()
    with pytest.raises(RecipeError, match="has no file"):
        replace(mini, base="data").base_path()
    with pytest.raises(RecipeError, match="is not the recipe's"):
        replace(mini, base_sha256="0" * 64).base_path()


def test_split_command_writes_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str], mini: Recipe) -> None:
    assert main(["split", str(MINI / "recipe.toml"), "--out", str(tmp_path)]) == 0
    assert mini.split.sha256 in capsys.readouterr().out
    for part in ("dev", "test"):
        assert (tmp_path / f"{part}.jsonl").read_bytes() == (MINI / "splits" / f"{part}.jsonl").read_bytes()


def test_a_recipe_can_take_another_ones_data(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "recipe.toml").write_text(
        'name = "a"\nversion = "0"\nlicence = "x"\nbase = "x"\nbase_model = "x"\nagents = "x"\n'
        '[data]\ntasks = ["data/t.jsonl"]\nsoft_labels = "s"\n[split]\nsalt = "salt"\n[commits]\nweight = 0.5\n'
    )
    (tmp_path / "b").mkdir()
    own = 'name = "b"\nversion = "0"\nlicence = "x"\nbase = "x"\nbase_model = "x"\nagents = "x"\n'
    path = tmp_path / "b" / "recipe.toml"
    path.write_text(own + 'data_from = "../a/recipe.toml"\n')
    recipe = load_recipe(path)
    assert (recipe.name, recipe.split.salt, recipe.commits.weight) == ("b", "salt", 0.5)
    assert recipe.resolve(recipe.data.tasks[0]).resolve() == (tmp_path / "a" / "data" / "t.jsonl").resolve()
    assert recipe.resolve(recipe.data.soft_labels).resolve() == (tmp_path / "a" / "s").resolve()
    path.write_text(own + 'data_from = "../a/recipe.toml"\n[split]\nsalt = "mine"\n')
    with pytest.raises(RecipeError, match="Keep one"):
        load_recipe(path)


def test_nothing_held_out_is_trained_on(dataset: Dataset) -> None:
    """The blind sets and the out-of-scope test prompts are near no task of the train part."""
    train = [frozenset(normalise(e.task).split()) for e in dataset.train]
    by_word: dict[str, list[int]] = {}
    for position, words in enumerate(train):
        for word in words:
            by_word.setdefault(word, []).append(position)
    held_out = [
        json.loads(line)["task"]
        for name in ("blind-a", "blind-b", "blind-c", "blind-d", "out-of-scope")
        for line in (MINI / "splits" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(held_out) > 2200
    for task in held_out:
        words = frozenset(normalise(task).split())
        near = {position for word in words for position in by_word.get(word, ())}
        assert all(len(words & train[p]) < 0.6 * len(words | train[p]) for p in near), task
