"""From a recipe, or from a bundle and a file of tasks, to what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from edge.agents import Agent, load_agents
from export.checkpoint import Checkpoint, load_checkpoint
from export.dataset import (
    OUT_OF_SCOPE,
    Dataset,
    Example,
    load_commits,
    load_dataset,
    load_extra,
    load_preferences,
    split_groups,
)
from export.decoder import LONGEST
from export.errors import CheckpointError, RecipeError
from export.finetune import Plan
from export.parity import parity_texts
from export.recipe import Recipe, Split, Student, Train
from export.soft_labels import ask, read_soft_labels
from export.student import shrink
from export.unpack import is_bundle, unpack_bundle
from export.variations import variations

# Going on from a trained checkpoint: short and gentle, and held to what the checkpoint said before.
ADAPTATION = Train(
    epochs=3,
    batch_size=32,
    learning_rate=1e-5,
    head_learning_rate=3e-4,
    precision="bfloat16",
    infonce_weight=0.0,
    triplet_weight=0.0,
    soft_weight=1.0,
    retention_weight=50.0,
    imitation_weight=2.0,
    label_share=0.0,
    seed=7,
)
_FEWEST_STEPS = 60  # a handful of tasks is gone over more often than three times
_ANCHOR_COPIES = 40  # variations of each of the exporter's own tasks, to hold the old answers by
_ANCHORS_A_TASK = 3
_EXTRA_SPLIT = Split(salt="extra", dev_percent=10.0, test_percent=0.0)


def plan_recipe(
    recipe: Recipe, *, commits: Sequence[Path] = (), start: Path | None = None, extra: Sequence[Path] = ()
) -> Plan:
    """What a recipe says.

    Args:
        recipe: Data and settings.
        commits: Files of commit subjects; needed if the recipe gives them a weight.
        start: Checkpoint or bundle to go on from, by the short settings of ``ADAPTATION``, instead
            of training the recipe's base.
        extra: Files of further tasks to train on.

    Raises:
        RecipeError: Data or base weights are not what the recipe says.
        CheckpointError: ``start`` or the base cannot be used.
    """
    agents = load_agents(recipe.resolve(recipe.agents))
    names = [agent.name for agent in agents]
    dataset = load_dataset(recipe, names)
    further = _commits(recipe, names, dataset, commits)
    made_up = _variations(recipe, dataset)
    for path in extra:
        dataset = replace(dataset, train=[*dataset.train, *load_extra(path, names, dataset, 1.0)])
    settings = recipe.train if start is None else ADAPTATION
    soft: dict[str, torch.Tensor] = {}
    if settings.soft_weight > 0 and (recipe.data.soft_labels or start is None):
        soft = read_soft_labels(
            recipe.resolve(recipe.data.soft_labels), names, [*(e.task for e in (*dataset.train, *further)), *made_up]
        )
        labels = [*names, OUT_OF_SCOPE]
        further = [*further, *(Example(t, labels[int(soft[t].argmax())], None, 0.0) for t in made_up if t in soft)]
    base = load_start(recipe.base_path() if start is None else start)
    begin = base
    if start is None and recipe.student != Student():
        begin = shrink(base, recipe.student, [e.task for e in (*dataset.train, *further)])
    return Plan(
        name=recipe.name,
        start=begin,
        reference=base,
        agents=agents,
        dataset=dataset,
        settings=settings,
        lora=recipe.lora,
        extra=further,
        judged=[
            judged
            for name in (recipe.data.preferences if settings.reward_weight > 0 else ())
            for judged in load_preferences(recipe.resolve(name), names, dataset)
        ],
        soft=soft,
    )


def plan_adaptation(start: Path, extra: Sequence[Path]) -> Plan:
    """Going on from a checkpoint or bundle with tasks of one's own and nothing else.

    A tenth of the tasks, chosen by hash, is the dev split. What the checkpoint knew is held by its
    own answers on made-up tasks (learning without forgetting, Li and Hoiem 2016, arXiv:1606.09282)
    and by the retention of vectors. Training with its recipe as well forgets less.

    Raises:
        CheckpointError: ``start`` cannot be used or has no trained head.
        RecipeError: A file is broken or names agents that the head does not know.
    """
    begin = load_start(start)
    if begin.head is None:
        raise CheckpointError(f"{start}: has no trained head to go on from. Train with a recipe instead.")
    names = list(begin.head.agents)
    empty = Dataset([], [], [])
    groups = [[example] for path in extra for example in load_extra(path, names, empty, 1.0)]
    dataset = split_groups(groups, _EXTRA_SPLIT, ", ".join(map(str, extra)))
    if not dataset.train:
        raise RecipeError("no tasks to train on. Give a file with --extra.")
    steps = -(-len(dataset.train) // ADAPTATION.batch_size)
    anchors = variations(parity_texts("tasks"), _ANCHOR_COPIES, ADAPTATION.seed)
    soft = dict(zip(anchors, ask(begin, begin.head, anchors, ADAPTATION.temperature, quiet=True), strict=True))
    labels = [*names, OUT_OF_SCOPE]
    tasks = [e.task for e in dataset.train]
    for example, answer in zip(dataset.train, ask(begin, begin.head, tasks, ADAPTATION.temperature, True), strict=True):
        # Labels out of a history are noisy: half of the target is what the checkpoint would have said.
        said = torch.zeros_like(answer)
        said[labels.index(example.agent)] = 1.0
        soft[example.task] = (said + answer) / 2
    settings = replace(
        ADAPTATION,
        epochs=max(ADAPTATION.epochs, -(-_FEWEST_STEPS // steps)),
        extra_share=min(1.0, _ANCHORS_A_TASK * len(dataset.train) / len(anchors)),
    )
    return Plan(
        name=f"{start.resolve().name} adapted",
        start=begin,
        reference=begin,
        agents=[Agent(name) for name in names],
        dataset=dataset,
        settings=settings,
        extra=[Example(text, labels[int(soft[text].argmax())], None, 0.0) for text in anchors],
        soft=soft,
    )


def training_texts(recipe: Recipe, commits: Sequence[Path] = ()) -> list[str]:
    """All texts that a recipe trains on, variations included: those a teacher is asked about."""
    names = [agent.name for agent in load_agents(recipe.resolve(recipe.agents))]
    dataset = load_dataset(recipe, names)
    examples = [*dataset.train, *_commits(recipe, names, dataset, commits)]
    return [*(e.task for e in examples), *_variations(recipe, dataset)]


def _commits(recipe: Recipe, names: list[str], dataset: Dataset, paths: Sequence[Path]) -> list[Example]:
    if recipe.commits.weight <= 0:
        return []
    if not paths:
        raise RecipeError(
            f"{recipe.path}: trains on commit subjects, which are not in the repository. Give files of "
            '{"task", "agent"} lines with --commits, or set weight = 0 under [commits].'
        )
    return load_commits(paths, recipe, names, dataset)


def _variations(recipe: Recipe, dataset: Dataset) -> list[str]:
    tasks = [e.task for e in dataset.train]
    known = set(tasks)
    return [text for text in variations(tasks, recipe.data.variations, recipe.train.seed) if text not in known]


def load_start(path: Path) -> Checkpoint:
    """A checkpoint, or a bundle as one."""
    if path.suffix != ".gguf" and is_bundle(path):
        return unpack_bundle(path)
    # A language model keeps the length that it can generate with; training cuts its texts anyway.
    return load_checkpoint(path, longest=LONGEST)
