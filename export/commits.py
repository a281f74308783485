"""Weakly labelled tasks out of a repository's conventional commits (conventionalcommits.org)."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.dataset import normalise
from export.errors import RecipeError

AGENT_OF_TYPE = {
    "feat": "coder",
    "fix": "debugger",
    "docs": "documenter",
    "refactor": "refactorer",
    "test": "tester",
    "perf": "optimizer",
    "ci": "devops",
}
_SUBJECT = re.compile(r"(?P<type>[a-z]+)(?:\((?P<scope>[^()]*)\))?!?:\s+(?P<task>\S.*)", re.IGNORECASE)
_REFERENCES = re.compile(
    r"\s*\((?:[\w./-]*#\d+(?:,\s*)?)+\)\s*$|\s*\[skip ci\]|\s*\((?:closes?|fixe?s?)\s[^)]*\)", re.I
)
# What a machine or a habit writes says nothing of the work.
_NOISE = re.compile(
    r"^(?:bump|update|upgrade|pin)\s+(?:\S*\s)?(?:dependenc|deps\b|version|lock)|^bump \S+ from|^release\b|^v?\d+\.\d+"
    r"|^revert\b|^merge\b|^wip\b|^(?:fix )?typos?$|^(?:fix )?lint(?:ing)?$|^initial commit",
    re.IGNORECASE,
)
_FEWEST_WORDS, _MOST_WORDS = 3, 30


@dataclass(frozen=True, slots=True)
class Mined:
    """Tasks of one or more repositories and what became of every commit.

    Attributes:
        rows: ``{"task", "agent", "source"}``, oldest commit first.
        counts: By agent.
        left_out: Number of commits by the reason for which they were left out.
    """

    rows: list[dict[str, str]]
    counts: dict[str, int]
    left_out: dict[str, int]


def mine_commits(repositories: Sequence[str | Path], most: int | None = None) -> Mined:
    """Turn the history of checkouts into labelled tasks: type to agent, subject to task.

    Merges, other types, subjects of bots or of a few words and repeated ones are left out; a subject
    that occurs with two types is left out altogether.

    Args:
        repositories: Folders of checkouts or bare clones; ``FOLDER@REVISION`` reads the history of
            a revision instead of ``HEAD``, which a repeatable result needs.
        most: Keep at most this many tasks of an agent from one repository, its newest, so that
            none drowns the others.

    Raises:
        RecipeError: A path is no git repository with a history, or git is not installed.
    """
    if most is not None and most < 1:
        raise RecipeError(f"at most {most} tasks of an agent would be none. Ask for 1 or more.")
    left_out: Counter[str] = Counter()
    found: dict[str, tuple[int, dict[str, str]]] = {}
    disputed: set[str] = set()
    for number, given in enumerate(map(str, repositories)):
        folder, revision = _folder_and_revision(given)
        for subject in _subjects(folder, revision, given):
            row = _row(subject, _name(folder), left_out)
            if row is None:
                continue
            key = normalise(row["task"])
            if key in found or key in disputed:
                left_out["said before"] += 1
                if key in found and found[key][1]["agent"] != row["agent"]:
                    del found[key]
                    disputed.add(key)
                    left_out["said with two types"] += 1
                continue
            found[key] = (number, row)
    rows = _newest(list(found.values()), most, left_out)
    return Mined(rows, dict(Counter(row["agent"] for row in rows).most_common()), dict(left_out.most_common()))


def _newest(
    found: Sequence[tuple[int, dict[str, str]]], most: int | None, left_out: Counter[str]
) -> list[dict[str, str]]:
    """The rows, or each repository's ``most`` newest of an agent."""
    taken: Counter[tuple[int, str]] = Counter()
    kept = []
    for number, row in reversed(found):
        taken[number, row["agent"]] += 1
        if most is None or taken[number, row["agent"]] <= most:
            kept.append(row)
    if len(kept) < len(found):
        left_out["older than the newest that were asked for"] += len(found) - len(kept)
    return kept[::-1]


def _folder_and_revision(given: str) -> tuple[Path, str]:
    """``FOLDER@REVISION`` in two; a folder's own name may hold an "@", and so may a revision."""
    parts = given.split("@")
    for length in range(len(parts), 0, -1):
        folder = "@".join(parts[:length])
        if folder and Path(folder).is_dir():
            return Path(folder), "@".join(parts[length:]) or "HEAD"
    return Path(given), "HEAD"


def _row(subject: str, source: str, left_out: Counter[str]) -> dict[str, str] | None:
    match = _SUBJECT.fullmatch(subject.strip())
    if match is None:
        left_out["no conventional subject"] += 1
        return None
    agent = AGENT_OF_TYPE.get(match["type"].lower())
    if agent is None:
        left_out["another type"] += 1
        return None
    task = _REFERENCES.sub("", match["task"]).strip()
    if _NOISE.search(task):
        left_out["written by a machine or habit"] += 1
        return None
    if not _FEWEST_WORDS <= len(task.split()) <= _MOST_WORDS:
        left_out["too short or too long"] += 1
        return None
    return {"task": task, "agent": agent, "source": source}


def _name(repository: Path) -> str:
    folder = Path(os.path.normpath(Path.cwd() / repository))  # unlike resolve(), keeps the name of a link
    return folder.parent.name if folder.name == ".git" else folder.name.removesuffix(".git")


def _subjects(repository: Path, revision: str, given: str) -> Iterable[str]:
    command = ["git", "-C", str(repository), "log", "--no-merges", "--reverse", "--format=%s"]
    command += ["--end-of-options", revision, "--"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603
    except FileNotFoundError:
        raise RecipeError("git is not installed. Install git to read histories.") from None
    if done.returncode != 0:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise RecipeError(
            f"{given}: no history can be read ({reason[-1] if reason else 'git failed'}). Give the folder of a git "
            "checkout or bare clone, and after '@' a revision that it has."
        )
    return done.stdout.decode("utf-8", "replace").splitlines()
