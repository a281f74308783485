from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge import Agent, AgentError, load_agents


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


TOML = """# my agents
[[agents]]
name = "terraformer"
description = "Writes Terraform."
keywords = ["terraform", "hcl"]
priority = 3

[[agents]]
name = "painter"
description = "Draws pictures."
examples = ["draw a cat"]
"""


def test_toml_and_json_give_the_same_agents(tmp_path: Path) -> None:
    from_toml = load_agents(write(tmp_path, "a.toml", TOML))
    records = [
        {"name": "terraformer", "description": "Writes Terraform.", "keywords": ["terraform", "hcl"], "priority": 3},
        {"name": "painter", "description": "Draws pictures.", "examples": ["draw a cat"]},
    ]
    for document in (records, {"agents": records}):
        assert load_agents(write(tmp_path, "a.json", json.dumps(document, indent=1))) == from_toml
    assert from_toml[0] == Agent("terraformer", "Writes Terraform.", ("terraform", "hcl"), priority=3)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (TOML.replace('"painter"', '"terraformer"'), 8, "already defined at"),
        (TOML.replace('"painter"', '" "'), 9, "no name"),
        (TOML.replace("examples", "exmaples"), 11, "unknown field 'exmaples'"),
        (TOML.replace("priority = 3", "priority = true"), 6, "priority must be an integer"),
        (TOML.replace('["draw a cat"]', '["draw", 3]'), 11, "list of non-empty strings"),
        (TOML.replace('"Draws pictures."', "7"), 10, "description must be a string"),
        (TOML.replace('description = "Draws pictures."\nexamples = ["draw a cat"]', ""), 8, "neither description"),
        (TOML.replace("name =", "name", 1), 3, "not valid TOML"),
        ('title = "x"\n' + TOML, 1, "unknown key 'title'"),
        ("agents = 3\n", 1, "must be a list"),
    ],
)
def test_toml_errors_name_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, "a.toml", text)
    with pytest.raises(AgentError, match=words) as error:
        load_agents(path)
    assert str(error.value).startswith(f"{path}:{line}:")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[\n {"name": "a", "description": "x"},\n {"name": "a", "description": "y"}\n]', 3, "already defined at .*:2"),
        ('{"agents": [\n {"name": "a",\n  "colour": "x"}\n]}', 3, "unknown field 'colour'"),
        ('[\n {"name": "", "description": "x"}]', 2, "no name"),
        ('[\n {"name": "a" "description": "x"}]', 2, "not valid JSON"),
        ("[\n\n 3]", 3, "must be a table"),
        ('{"agents": [],\n "more": 1}', 2, "unknown key 'more'"),
        ("7", 1, "must be a list"),
        ('[{"name": "a", "name": "b", "description": "x"}]', 1, "occurs twice"),
        ('[{"name": "a", "description": "x", "priority": ' + "9" * 5000 + "}]", 1, "not usable JSON"),
        ('[{"name": "none", "description": "x"}]', 1, "stands for"),
        ("[" * 100_000, 1, "nested too deeply|not valid JSON"),
    ],
)
def test_json_errors_name_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, "a.json", text)
    with pytest.raises(AgentError, match=words) as error:
        load_agents(path)
    assert str(error.value).startswith(f"{path}:{line}:")


def test_markdown_folder_as_claude_code_has_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        "reviewer.md",
        "---\nname: reviewer\ndescription: Use this when: code changed. <example>user: 'look'</example>\n"
        "tools: Read, Grep\nmodel: sonnet\ncolor: red\n---\n\nYou review code: carefully.\n",
    )
    write(
        tmp_path,
        "deploy.md",
        '---\nname: "deployer"  # a comment\ndescription: >\n  Ships builds\n  to production.\n'
        "type: swarm\npriority: high\n"
        "hooks:\n  pre: |\n    echo: hello\nkeywords:\n  - deploy\n  - 'roll back'\nexamples: [ship it, \"go, live\"]\n"
        "---\nbody\n",
    )
    write(tmp_path, "README.md", "not an agent")
    assert load_agents(tmp_path) == [
        Agent("deployer", "Ships builds to production.", ("deploy", "roll back"), examples=("ship it", "go, live")),
        Agent("reviewer", "Use this when: code changed. <example>user: 'look'</example>"),
    ]


def test_claude_flow_examples_are_objects(tmp_path: Path) -> None:
    text = (
        '---\nname: dev\nsparc_phase: x\ndescription: d\nexamples:\n  - trigger: "build it"\n    response: "ok"\n---\n'
    )
    assert load_agents(write(tmp_path, "a.md", text)) == [Agent("dev", "d", examples=("build it",))]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: x\n", 1, "no front matter"),
        ("---\nname: x\ndescription: y\n", 3, "not closed"),
        ("---\nname: x\nwhat is this\n---\n", 3, "broken front matter"),
        ("---\nname: x\nname: y\n---\n", 3, "occurs twice"),
        ("---\nname: x\ndescripton: y\n---\n", 3, "unknown field 'descripton'"),
        ("---\nname:\ndescription: y\n---\n", 2, "no name"),
        ("---\nname: [x]\ndescription: y\n---\n", 2, "must be text"),
        ("---\nname: 'x' y\ndescription: y\n---\n", 2, "after the closing quote"),
        ('---\nname: "a\\nb"\ndescription: y\n---\n', 2, "cannot be printed"),
        ('---\nname: x\ndescription: "half\n---\n', 3, "quotes are not closed"),
        ("---\nname: x\ndescription: y\nkeywords: [a, b\n---\n", 4, "not closed"),
    ],
)
def test_markdown_errors_name_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, "a.md", text)
    with pytest.raises(AgentError, match=words) as error:
        load_agents(tmp_path)
    assert str(error.value).startswith(f"{path}:{line}:")


def test_duplicate_names_across_files_name_both(tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        write(tmp_path, name, "---\nname: twin\ndescription: x\n---\n")
    with pytest.raises(AgentError, match=r"b\.md:1: agent 'twin' was already defined at .*a\.md:1"):
        load_agents(tmp_path)


def test_missing_empty_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AgentError, match="no such file"):
        load_agents(tmp_path / "nothing.toml")
    with pytest.raises(AgentError, match="no Markdown files"):
        load_agents(tmp_path / "empty")
    with pytest.raises(AgentError, match="cannot tell the format"):
        load_agents(write(tmp_path, "a.yaml", "x"))
    with pytest.raises(AgentError, match="no agents"):
        load_agents(write(tmp_path, "a.json", "[]"))
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AgentError, match="UTF-8"):
        load_agents(tmp_path / "b.toml")
