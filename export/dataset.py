"""Labelled tasks: reading, joining near-duplicates, and the fixed train/dev/test partition."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.errors import RecipeError
from export.recipe import Recipe, Split

OUT_OF_SCOPE = "none"


@dataclass(frozen=True, slots=True)
class Example:
    """A task and the agent that should take it.

    ``near`` names the agent that is wrong but tempting, where the author noted one: what a keyword
    matcher would take, or the agent of a minimal pair's other side.
    """

    task: str
    agent: str
    near: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Judged:
    """Judged scores of several candidate agents for one task."""

    task: str
    scores: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Dataset:
    """The partition of a recipe's authored data. Commit subjects join ``train`` only."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]

    def digest(self) -> str:
        """sha256 over which task is in which part; the order of files and lines does not matter."""
        lines = sorted(
            f"{part}\t{example.agent}\t{example.task}"
            for part, examples in (("train", self.train), ("dev", self.dev), ("test", self.test))
            for example in examples
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Objects of a JSON-lines file with their line numbers.

    Raises:
        RecipeError: The file is missing or a line is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error}). Convert the file.") from None
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such data file. Correct the path in the recipe or on the command line."
        ) from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path}:{number}: not valid JSON ({error}). Correct the line.") from None
        if not isinstance(row, dict):
            raise RecipeError(f"{path}:{number}: not a JSON object. Write one object a line.")
        yield number, row


def _example(row: dict[str, object], where: str, agents: set[str]) -> Example:
    task, agent, near = row.get("task"), row.get("agent"), row.get("near")
    if not isinstance(task, str) or not task.strip():
        raise RecipeError(f"{where}: no text under 'task'. Correct the line.")
    if not isinstance(agent, str) or agent not in agents:
        raise RecipeError(f"{where}: agent {agent!r} is not one of {', '.join(sorted(agents))}. Correct the line.")
    if near is not None and (not isinstance(near, str) or near not in agents):
        raise RecipeError(f"{where}: 'near' names {near!r}, which is no agent. Correct the line.")
    return Example(task, agent, near)


def load_dataset(recipe: Recipe, agents: list[str]) -> Dataset:
    """Read the recipe's authored data and split it.

    Tasks that say nearly the same (token-set Jaccard similarity of at least
    ``split.near_duplicate``) and both sides of a minimal pair stay together in one part, so that
    dev and test measure unseen tasks. The part follows from a hash of the group's text: adding
    data later moves nothing that is there.

    Raises:
        RecipeError: A file is broken, one text carries two labels, or the partition is not the one
            whose digest the recipe states.
    """
    known = {*agents, OUT_OF_SCOPE}
    groups: list[list[Example]] = []
    for name in (*recipe.data.tasks, *recipe.data.out_of_scope):
        path = recipe.resolve(name)
        groups.extend([_example(row, f"{path}:{n}", known)] for n, row in read_jsonl(path))
    for name in recipe.data.pairs:
        path = recipe.resolve(name)
        for n, row in read_jsonl(path):
            sides = [row.get("a"), row.get("b")]
            if not all(isinstance(side, dict) for side in sides):
                raise RecipeError(f"{path}:{n}: a pair needs objects under 'a' and 'b'. Correct the line.")
            a, b = (_example(side, f"{path}:{n}", known) for side in sides if isinstance(side, dict))
            groups.append([Example(a.task, a.agent, b.agent), Example(b.task, b.agent, a.agent)])
    dataset = split_groups(groups, recipe.split, str(recipe.path))
    if recipe.split.sha256 and dataset.digest() != recipe.split.sha256:
        raise RecipeError(
            f"{recipe.path}: the data give the partition {dataset.digest()}, not the stated {recipe.split.sha256}. "
            "If the data were changed on purpose, state the new digest under [split]."
        )
    return dataset


def split_groups(groups: list[list[Example]], split: Split, where: str) -> Dataset:
    """Join near-duplicates and put every group into a part by a hash of its text.

    Raises:
        RecipeError: One text carries two labels; the message begins with ``where``.
    """
    parts: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
    label_of: dict[str, str] = {}
    for group in _join_near_duplicates(groups, split.near_duplicate):
        key = min(hashlib.sha256((split.salt + normalise(e.task)).encode()).hexdigest() for e in group)
        position = int(key[:8], 16) / 0xFFFFFFFF * 100
        dev, test = split.dev_percent, split.test_percent
        part = "dev" if position < dev else "test" if position < dev + test else "train"
        for example in group:
            text = normalise(example.task)
            if label_of.setdefault(text, example.agent) != example.agent:
                raise RecipeError(
                    f"{where}: the task {example.task!r} is labelled both {label_of[text]} and {example.agent}. "
                    "Keep one."
                )
        seen: set[str] = set()
        for example in group:
            if normalise(example.task) not in seen:
                seen.add(normalise(example.task))
                parts[part].append(example)
    return Dataset(**parts)


def load_commits(paths: Sequence[Path], recipe: Recipe, agents: list[str], dataset: Dataset) -> list[Example]:
    """Commit subjects for training; those that equal a dev or test task are left out.

    Of a subject that occurs more than once the first one's label counts.

    Raises:
        RecipeError: The files are not those whose digests the recipe states, or a row is broken.
    """
    stated = recipe.commits.sha256
    if stated and len(paths) != len(stated):
        raise RecipeError(
            f"{recipe.path}: was written for {len(stated)} files of commit subjects; {len(paths)} were given. Give "
            "each with --commits, in the recipe's order, or change sha256 under [commits] (empty takes any)."
        )
    for path, wanted in zip(paths, stated, strict=False):  # nothing stated takes any
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        if digest != wanted:
            raise RecipeError(
                f"{path}: sha256 {digest} is not the recipe's {wanted}. Give the files that the recipe "
                "was written for in its order, or change sha256 under [commits] (empty takes any)."
            )
    found = [example for path in paths for example in load_extra(path, agents, dataset, recipe.commits.weight)]
    return list({normalise(example.task): example for example in reversed(found)}.values())[::-1]


def load_extra(path: Path, agents: list[str], dataset: Dataset, weight: float) -> list[Example]:
    """More tasks to train on, ``{"task", "agent"}``; those that equal a dev or test task are left out."""
    held_out = {normalise(e.task) for e in (*dataset.dev, *dataset.test)}
    known = {*agents, OUT_OF_SCOPE}
    rows = (_example(row, f"{path}:{n}", known) for n, row in read_jsonl(path))
    return [Example(e.task, e.agent, e.near, weight) for e in rows if normalise(e.task) not in held_out]


def load_preferences(path: Path, agents: list[str], dataset: Dataset) -> list[Judged]:
    """Rows ``{"task", "scores": {agent: score}}``; those that equal a dev or test task are left out.

    Raises:
        RecipeError: A row is broken, or names an unknown agent or fewer than two.
    """
    held_out = {normalise(e.task) for e in (*dataset.dev, *dataset.test)}
    judged = []
    for n, row in read_jsonl(path):
        task, scores = row.get("task"), row.get("scores")
        if not isinstance(task, str) or not isinstance(scores, dict) or len(scores) < 2:
            raise RecipeError(
                f'{path}:{n}: not {{"task": text, "scores": {{agent: score, ...}}}} with two or more '
                "agents. Correct the line."
            )
        for agent, score in scores.items():
            if agent not in agents or isinstance(score, bool) or not isinstance(score, (int, float)):
                raise RecipeError(f"{path}:{n}: {agent!r}: {score!r} is not an agent with a number. Correct the line.")
        if normalise(task) not in held_out:
            judged.append(Judged(task, tuple((agent, float(score)) for agent, score in scores.items())))
    return judged


def normalise(text: str) -> str:
    """Case-folded words and digits, for comparing texts."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _join_near_duplicates(groups: list[list[Example]], threshold: float) -> list[list[Example]]:
    """Union groups of which two members are near-duplicates (Jaccard over token sets)."""
    members = [(index, frozenset(normalise(e.task).split())) for index, group in enumerate(groups) for e in group]
    postings: dict[str, list[int]] = defaultdict(list)
    for position, (_, tokens) in enumerate(members):
        for token in tokens:
            postings[token].append(position)
    parent = list(range(len(groups)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for position, (index, tokens) in enumerate(members):
        # Two sets with Jaccard >= t share at least t*|a| tokens, so they meet in one of the
        # |a| - t*|a| + 1 rarest: only those postings need a look (prefix filtering).
        rarest = sorted(tokens, key=lambda token: (len(postings[token]), token))
        prefix = rarest[: len(tokens) - int(threshold * len(tokens)) + 1]
        candidates = {p for token in prefix for p in postings[token] if p < position}
        for candidate in candidates:
            other_index, other = members[candidate]
            shared = len(tokens & other)
            if shared >= threshold * (len(tokens) + len(other) - shared):
                parent[root(index)] = root(other_index)
    joined: dict[int, list[Example]] = defaultdict(list)
    for index, group in enumerate(groups):
        joined[root(index)].extend(group)
    return list(joined.values())
