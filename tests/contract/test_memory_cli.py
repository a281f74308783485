"""``ruvltra memory`` and ``ruvltra index``, as a user types them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.cli import main
from edge.notes import LONGEST, passages

NOTES = """---
title: not a passage
---
# Runbook

Restart the queue worker with systemctl.

## Database

The primary is orders-db-1.

```sh
# not a heading
psql orders
```

## Database

A second section of the same name.
"""


def ruvltra(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    store = tmp_path / "store"
    ruvltra(capsys, "memory", "add", store, "--id", "redis", "--metadata", '{"year": 2024}', "Sessions live in Redis")
    ruvltra(capsys, "memory", "add", store, "Orders live in PostgreSQL", "Deploys run on Mondays")
    return store


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_add_search_get_delete(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line, *_) = ruvltra(capsys, "memory", "search", folder, "where are user sessions kept")
    assert "redis" in line
    assert "Sessions live in Redis" in line
    (row,) = ruvltra(capsys, "memory", "search", folder, "--json", "-k", "1", "--where", "year>=2020", "sessions")
    answer = json.loads(row)
    assert answer["query"] == "sessions"
    assert [hit["id"] for hit in answer["hits"]] == ["redis"]
    assert answer["hits"][0]["metadata"] == {"year": 2024}
    assert answer["ms"] > 0
    assert json.loads(ruvltra(capsys, "memory", "get", folder, "redis")[0])["text"] == "Sessions live in Redis"
    ruvltra(capsys, "memory", "delete", folder, "redis")
    assert main(["memory", "get", str(folder), "redis"]) == 1
    assert main(["memory", "delete", str(folder), "redis"]) == 1
    assert "no record 'redis'" in capsys.readouterr().err


def test_texts_from_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, "a first fact\n\na second fact\n")
    assert len(ruvltra(capsys, "memory", "add", folder, "-")) == 2
    pipe(monkeypatch, "first\nsecond\n")
    rows = [json.loads(row) for row in ruvltra(capsys, "memory", "search", folder, "--json", "-k", "1", "-")]
    assert [row["hits"][0]["text"] for row in rows] == ["a first fact", "a second fact"]
    pipe(monkeypatch, '{"text": "third", "id": "3"}\n')
    assert ruvltra(capsys, "memory", "import", folder, "--format", "jsonl", "-") == ["1 records imported"]
    pipe(monkeypatch, "fourth\n")
    assert ruvltra(capsys, "memory", "import", folder, "-") == ["1 records imported"]


def test_exported_and_imported_it_is_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ruvltra(capsys, "memory", "add", folder, "--ttl", "500", "--namespace", "n", "Passing")
    rows = ruvltra(capsys, "memory", "export", folder, "--vectors")
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr("edge.Encoder.load", None)  # vectors are there: nothing is embedded
    assert ruvltra(capsys, "memory", "import", tmp_path / "again", tmp_path / "all.jsonl") == ["4 records imported"]
    again = ruvltra(capsys, "memory", "export", tmp_path / "again", "--vectors")

    def said(row: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(row)
        values.pop("created")
        assert 400 < values.pop("ttl", 450) < 501
        return values

    assert [said(row) for row in again] == [said(row) for row in rows]


def test_notes_are_passages_and_a_changed_note_replaces_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, notes = tmp_path / "store", tmp_path / "notes"
    (notes / "deep").mkdir(parents=True)
    (notes / "deep" / "run.md").write_text(NOTES)
    (notes / "empty.md").write_text("")
    assert ruvltra(capsys, "memory", "import", store, notes) == ["3 records imported"]
    rows = [json.loads(row) for row in ruvltra(capsys, "memory", "export", store)]
    note = (notes / "deep" / "run.md").as_posix()
    assert [row["id"] for row in rows] == [
        f"{note}#Runbook#1",
        f"{note}#Runbook > Database#1",
        f"{note}#Runbook > Database#2",
    ]
    assert rows[1]["metadata"] == {"source": note, "heading": "Runbook > Database", "line": 10}
    assert "# not a heading\npsql orders" in rows[1]["text"]
    (notes / "deep" / "run.md").write_text(NOTES.replace("orders-db-1", "orders-db-2").rpartition("##")[0])
    line = "1 records imported, 1 unchanged, 1 that their notes no longer have removed"
    assert ruvltra(capsys, "memory", "import", store, notes) == [line]
    rows = [json.loads(row) for row in ruvltra(capsys, "memory", "export", store)]
    assert "orders-db-2" in rows[1]["text"]
    assert len(rows) == 2
    assert ruvltra(capsys, "memory", "import", store, notes / "deep") == ["0 records imported, 2 unchanged"]


def test_notes_take_nobody_elses_place_and_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    for name, text in (("a", "apples"), ("b", "bridges")):
        (tmp_path / name / "node_modules").mkdir(parents=True)
        (tmp_path / name / "README.md").write_text(f"# Same\n\n{text}\n")
        (tmp_path / name / "node_modules" / "other.md").write_text("of a package")
    mine = tmp_path / "a" / "README.md"
    ruvltra(capsys, "memory", "add", store, "--id", "mine", "--metadata", json.dumps({"source": str(mine)}), "my own")
    assert ruvltra(capsys, "memory", "import", store, tmp_path / "a", tmp_path / "b") == ["2 records imported"]
    texts = {json.loads(row)["text"] for row in ruvltra(capsys, "memory", "export", store)}
    assert texts == {"my own", "Same\napples", "Same\nbridges"}
    mine.write_text("")
    (line,) = ruvltra(capsys, "memory", "import", store, tmp_path / "a")
    assert line == "0 records imported, 1 that their notes no longer have removed"
    (tmp_path / "b" / "README.md").rename(tmp_path / "b" / "other.md")
    (line,) = ruvltra(capsys, "memory", "import", store, tmp_path / "b")
    assert line == "1 records imported, 1 that their notes no longer have removed"
    rows = [json.loads(row) for row in ruvltra(capsys, "memory", "export", store)]
    assert [row["text"] for row in rows] == ["my own", "Same\nbridges"]
    assert rows[1]["id"].endswith("/b/other.md#Same#1")


def test_headings_and_fences() -> None:
    text = "## X\n\na\n\n## Y\n\nb\n\n### C#\n\nc\n\n# Z #\n\nd\n\n##\n\ne\n"
    assert [(p["metadata"]["heading"], p["metadata"]["line"]) for p in passages(text, "n.md")] == [
        ("X", 3),
        ("Y", 7),
        ("Y > C#", 11),
        ("Z", 15),
        ("Z", 19),
    ]
    long = list(passages("# T\n\n" + "word " * 199 + "abc # TAIL", "n.md"))
    assert "# TAIL" in long[-1]["text"]
    fenced = "```sh\n```python\n# code\n```\n\n# Real\n\n```inline``` code\n\n# Next\n\nend"
    assert [p["metadata"]["heading"] for p in passages(fenced, "n.md")] == ["", "Real", "Next"]


def test_conditions_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, metadata in (("a", {"v": "1.0", "t": "web api"}), ("b", {"v": 1.0, "t": "api"}), ("c", {"v": 2})):
        ruvltra(capsys, "memory", "add", folder, "--id", name, "--metadata", json.dumps(metadata), f"deploy {name}")

    def found(*conditions: str) -> set[str]:
        options = [word for condition in conditions for word in ("--where", condition)]
        (row,) = ruvltra(capsys, "memory", "search", folder, "--json", *options, "deploy")
        return {hit["id"] for hit in json.loads(row)["hits"]}

    assert found("v=1.0") == {"a", "b"}
    assert found("t ~ api", "t~web") == {"a"}
    assert found("t=null", "v=2") == {"c"}
    assert found("v=1.0", "v=2") == {"a", "b", "c"}
    assert found("v>=1", "v<2") == {"b"}
    assert ruvltra(capsys, "memory", "delete", folder, "--where", "v>=1") == ["2 records deleted"]
    assert main(["memory", "delete", str(folder)]) == 1
    assert main(["memory", "delete", str(folder), "nobody"]) == 1
    assert "Look with: search" in capsys.readouterr().err


def test_a_failed_import_says_where_and_what_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i}" if i != 399 else " "}) + "\n" for i in range(500)))
    assert main(["memory", "import", str(tmp_path / "s"), str(rows)]) == 1
    error = capsys.readouterr().err
    assert "256 records were imported before, and stay" in error
    assert "record 144 has no text" in error
    assert f"from {rows}:257 to {rows}:500." in error
    (tmp_path / "list.json").write_text('[{"text": "one"}, {"text": "two", "namespace": "n"}]')
    assert ruvltra(capsys, "memory", "import", tmp_path / "t", tmp_path / "list.json") == ["2 records imported"]
    ruvltra(capsys, "memory", "import", tmp_path / "t", tmp_path / "list.json", "--namespace", "m")
    namespaces = json.loads(ruvltra(capsys, "memory", "stats", tmp_path / "t", "--json")[0])["namespaces"]
    assert namespaces == {"default": 1, "n": 1, "m": 2}


def test_long_passages_are_cut_between_words_and_nothing_is_lost() -> None:
    words = [f"word{i}" for i in range(1000)]
    text = "# A\n\n" + "\n\n".join(" ".join(words[i : i + 300]) for i in range(0, 1000, 300))
    found = list(passages(text, "n.md"))
    assert all(len(record["text"]) <= LONGEST + 10 for record in found)
    assert " ".join(record["text"].removeprefix("A\n") for record in found).split() == words
    assert len({record["id"] for record in found}) == len(found)
    unbroken = list(passages("x" * 2500, "n.md"))
    assert "".join(record["text"] for record in unbroken) == "x" * 2500
    fenced = list(passages("```\nnever closed\n# still code\n", "n.md"))
    assert [record["text"] for record in fenced] == ["```\nnever closed\n# still code"]


def test_stats_and_compact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "searched    3 exactly" in ruvltra(capsys, "memory", "compact", folder)
    stats = json.loads(ruvltra(capsys, "memory", "stats", folder, "--json")[0])
    assert (stats["records"], stats["since_compacted"], stats["segment"]["count"]) == (3, 0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory", "search", "{none}", "x"], "no memory store here"),
        (["memory", "get", "{none}", "x"], "no memory store here"),
        (["memory", "import", "{store}", "{none}"], "no such file"),
        (["memory", "add", "{store}", "--id", "a", "x", "y"], "single text"),
        (["memory", "add", "{store}", ""], "no text"),
        (["memory", "search", "{store}", "--where", "a>null", "x"], "where"),
        (["memory", "search", "{store}", "--diversity", "3", "x"], "diversity"),
        (["index", "search", "{none}", "x"], "no index here"),
        (["index", "build", "{none}", "{none}.npy"], "no such file"),
        (["index", "build", "{store}", "{store}/memory.sqlite"], "UTF-8|other files"),
        (["index", "build", "{none}", "--recall", "2", "{store}/memory.sqlite"], "recall is 2"),
    ],
)
def test_errors_say_what_to_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    import re

    given = [word.replace("{none}", str(tmp_path / "none")).replace("{store}", str(folder)) for word in arguments]
    assert main(given) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("ruvltra: ")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("value", ["a", "=1", "a!1", "a!=1", "a<>1", "a==1", "a>="])
def test_conditions_that_cannot_be_are_usage_errors(folder: Path, value: str) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "search", str(folder), "--where", value, "x"])


def test_building_and_searching_an_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("cats and dogs\nships at sea\ncats and dogs\ncode review\n")
    facts = json.loads(ruvltra(capsys, "index", "build", tmp_path / "a", tmp_path / "texts.txt", "--json")[0])
    assert (facts["count"], facts["dim"], facts["backend"]) == (3, 384, "exact")
    assert ruvltra(capsys, "index", "search", tmp_path / "a", "-k", "1", "a sailor's boat")[0].endswith("ships at sea")
    pipe(monkeypatch, "pets\n")
    answer = json.loads(ruvltra(capsys, "index", "search", tmp_path / "a", "--json", "-k", "1", "-")[0])
    assert answer["hits"][0]["id"] == "cats and dogs"

    vectors = np.random.default_rng(0).normal(size=(50, 8))
    np.save(tmp_path / "v.npy", vectors)
    (tmp_path / "ids.txt").write_text("".join(f"id {i}\n" for i in range(50)))
    ruvltra(capsys, "index", "build", tmp_path / "b", tmp_path / "v.npy", "--ids", tmp_path / "ids.txt")
    rows = ruvltra(capsys, "index", "search", tmp_path / "b", tmp_path / "v.npy", "-k", "1", "--json")
    assert [json.loads(row)["hits"][0]["id"] for row in rows] == [f"id {i}" for i in range(50)]
    assert "50 of 8 values" in ruvltra(capsys, "index", "inspect", tmp_path / "b")[0]

    rows = [json.dumps({"id": str(i), "vector": vector.tolist()}) for i, vector in enumerate(vectors)]
    (tmp_path / "v.jsonl").write_text("\n".join(rows))
    ruvltra(capsys, "index", "build", tmp_path / "c", tmp_path / "v.jsonl")
    assert main(["index", "search", str(tmp_path / "c"), "text"]) == 1  # of another dimension
