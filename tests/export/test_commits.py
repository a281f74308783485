from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from export.cli import main
from export.commits import mine_commits
from export.errors import RecipeError


def repository(folder: Path, subjects: list[str]) -> Path:
    """A real git repository with one empty commit a subject."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "init", "-q", folder], check=True)
    for subject in subjects:
        commit = ["git", "-C", folder, *identity, "commit", "-q", "--allow-empty", "--no-gpg-sign", "-m", subject]
        subprocess.run(commit, check=True)
    return folder


def test_types_become_agents_and_the_rest_is_left_out_with_its_reason(tmp_path: Path) -> None:
    repo = repository(
        tmp_path / "shop",
        [
            "feat(cart): keep the basket across logins (#12)",
            "fix!: close the stream after a timeout (#1, #2)",
            "perf: parse dates once per file",
            "Fix(api): accept an empty list of items",
            "ci: run the nightly job on two runners [skip ci]",
            "test: cover refunds in other currencies",
            "docs: explain how stores are added",
            "refactor: one reader for both formats",
            "chore: tidy the lock file again",
            "no conventional subject at all",
            "fix: typo",
            "feat: bump dependencies of the lib",
            "perf: parse dates once per file",
            "feat: same words for two types",
            "fix: same words for two types",
        ],
    )
    mined = mine_commits([repo])
    assert [(row["agent"], row["task"]) for row in mined.rows] == [
        ("coder", "keep the basket across logins"),
        ("debugger", "close the stream after a timeout"),
        ("optimizer", "parse dates once per file"),
        ("debugger", "accept an empty list of items"),
        ("devops", "run the nightly job on two runners"),
        ("tester", "cover refunds in other currencies"),
        ("documenter", "explain how stores are added"),
        ("refactorer", "one reader for both formats"),
    ]
    assert {row["source"] for row in mined.rows} == {"shop"}
    assert mined.counts["debugger"] == 2
    assert mined.left_out["another type"] == 1
    assert mined.left_out["no conventional subject"] == 1
    assert mined.left_out["written by a machine or habit"] == 2
    assert mined.left_out["said with two types"] == 1


def test_a_revision_and_the_newest_of_each_agent_can_be_asked_for(tmp_path: Path) -> None:
    subjects = [f"feat: draw layer {word} of the map" for word in ("one", "two", "three")]
    repo = repository(tmp_path / "maps", [*subjects, "fix: tiles no longer overlap"])
    assert [row["task"] for row in mine_commits([f"{repo}@HEAD~1"]).rows][-1] == "draw layer three of the map"
    mined = mine_commits([repo], most=2)
    assert [row["task"] for row in mined.rows] == [
        "draw layer two of the map",
        "draw layer three of the map",
        "tiles no longer overlap",
    ]
    assert mined.left_out["older than the newest that were asked for"] == 1
    (tmp_path / "odd@name").symlink_to(repo)
    assert {row["source"] for row in mine_commits([tmp_path / "odd@name"]).rows} == {"odd@name"}
    assert len(mine_commits([f"{tmp_path / 'odd@name'}@HEAD@{{0}}"]).rows) == 4
    with pytest.raises(RecipeError, match="maps@no-such-revision: no history"):
        mine_commits([f"{repo}@no-such-revision"])


def test_repositories_of_one_name_have_each_their_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for owner in ("ann", "bob"):
        (tmp_path / owner).mkdir()
        origin = repository(tmp_path / owner / "work", [f"fix: {owner} closes door {n} now" for n in range(3)])
        git = ["git", "clone", "--quiet", "--bare", str(origin), str(tmp_path / owner / "core.git")]
        subprocess.run(git, check=True)
    clones = [str(tmp_path / owner / "core.git") for owner in ("ann", "bob")]
    assert main(["mine-commits", *clones, "--most", "1", "--out", str(tmp_path / "tasks.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text("utf-8").splitlines()]
    assert [row["task"] for row in rows] == ["ann closes door 2 now", "bob closes door 2 now"]
    assert {row["source"] for row in rows} == {"core"}
    assert main(["mine-commits", *clones, "--most", "0", "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "1 or more" in capsys.readouterr().err


def test_command_writes_rows_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = repository(tmp_path / "repo", ["feat: draw the map with tiles", "fix: tiles no longer overlap"])
    out = tmp_path / "tasks.jsonl"
    assert main(["mine-commits", str(repo), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == {"coder": 1, "debugger": 1}
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert rows[0] == {"task": "draw the map with tiles", "agent": "coder", "source": "repo"}
    assert main(["mine-commits", str(repo), "--out", str(out)]) == 0
    assert "2 tasks" in capsys.readouterr().out


def test_no_repository_and_no_conventional_history_are_clear_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RecipeError, match="git checkout"):
        mine_commits([tmp_path / "missing"])
    repo = repository(tmp_path / "plain", ["first thing that came to mind"])
    assert main(["mine-commits", str(repo), "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "conventional" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()
