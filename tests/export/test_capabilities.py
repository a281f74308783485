"""A catalogue of one's own becomes part of a bundle, or nothing changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from edge import Capabilities, InputError, Router
from edge.doctor import examine
from export.capabilities import Found, fit_scorer, postings, read_catalogue
from export.cli import main
from tests.conftest import ROOT

NANO = ROOT / "models" / "ruvltra-nano" / "bundle"
ROWS: list[dict[str, Any]] = [
    {
        "ids": ["ours/command/deploy", "theirs/command/deploy"],
        "description": "Puts a build on the servers.",
        "keywords": ["release", "rollout"],
        "requests": ["ship the build to production", "roll out version two", "release it to the servers"],
    },
    {
        "ids": ["ours/agent/gardener"],
        "description": "Looks after flowers and beds.",
        "keywords": ["plants"],
        "requests": ["water the roses every morning", "who can weed the vegetable beds", "prune the apple trees"],
    },
    {
        "ids": ["theirs/hook/pre-commit"],
        "description": "Runs the linters before a commit is made.",
        "requests": ["stop commits that do not pass the linter", "check my code each time before I commit"],
    },
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(NANO, tmp_path / "bundle"))


def test_a_catalogue_of_ones_own(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decision = Router.load(bundle).route("Fix the login")
    for rows in (ROWS[:2], ROWS):  # the second one takes the place of the first
        assert main(["capabilities", str(write(tmp_path / "rows.jsonl", rows)), str(bundle)]) == 0
    assert "held-back requests, 8:" in capsys.readouterr().out
    catalogue = Capabilities.load(bundle)
    assert catalogue.ecosystems == ("ours", "theirs")
    (best,) = catalogue.search("prune the roses", k=1)
    assert (best.id, best.also, best.description) == ("ours/agent/gardener", (), "Looks after flowers and beds.")
    assert catalogue.search("rollout to production", k=1)[0].also == ("theirs/command/deploy",)
    assert {hit.id for hit in catalogue.search("anything", ecosystem="theirs")} == {
        "theirs/command/deploy",
        "theirs/hook/pre-commit",
    }
    assert Router.load(bundle).route("Fix the login") == decision
    assert [check.name for check in examine(bundle) if not check.ok] == []
    schema = json.loads((ROOT / "docs" / "bundle.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(json.loads((bundle / "bundle.json").read_bytes()), schema)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "rows.jsonl"}  # no work folder is left


def test_the_shipped_scorer_is_that_of_the_shipped_catalogue() -> None:
    shipped = ROOT / "models" / "ruvltra-mini" / "bundle"
    entries = json.loads((shipped / "capabilities.json").read_text(encoding="utf-8"))["entries"]
    rows = read_catalogue(ROOT / "models" / "capabilities" / "catalogue.jsonl")
    assert [(entry["ids"], entry["description"]) for entry in entries] == [(list(r.ids), r.description) for r in rows]
    with np.load(shipped / "capabilities.npz") as archive:
        starts, places, impacts = postings(rows)
        assert np.array_equal(archive["starts"], starts)
        assert np.array_equal(archive["places"], places)
        shares = archive["impacts"].astype(np.float64) / impacts
    assert np.allclose(shares, shares.mean(), rtol=2e-3)  # times a weight, in half precision


def test_what_cannot_be_told_apart_is_not_found(tmp_path: Path) -> None:
    same = {"description": "x", "requests": ["do the thing"] * 5}
    rows = read_catalogue(write(tmp_path / "rows.jsonl", [{"ids": [f"a/b/{i}"], **same} for i in range(4)]))

    class Constant:
        def encode(self, texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
            return np.tile(np.float32([0.6, 0.8]), (len(texts), 1))

    scorer, found = fit_scorer([row._replace(ids=("a/b/c",)) for row in rows], Constant())  # type: ignore[arg-type]
    assert np.isfinite(scorer.bias).all()
    assert found.first.hits == 0
    assert Found.of(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1, 1])).first.hits == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"ids": "ours/a/b"}, "'ids' must be a list of texts"),
        ({"ids": []}, "must be ecosystem/kind/name"),
        ({"ids": ["ours/b"]}, "must be ecosystem/kind/name"),
        ({"ids": ["ours//b"]}, "must be ecosystem/kind/name"),
        ({"ids": ["ours/agent/gardener"]}, "is in line 2, too"),
        ({"description": " "}, "'description' must be a text"),
        ({"requests": ["only one"]}, "fewer than two requests"),
        ({"keywords": [1]}, "'keywords' must be a list of texts"),
    ],
)
def test_rows_that_are_wrong_are_named(
    bundle: Path, tmp_path: Path, row: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    file = write(tmp_path / "rows.jsonl", [*ROWS, ROWS[2] | {"ids": ["ours/hook/other"]} | row])
    assert main(["capabilities", str(file), str(bundle)]) == 1
    error = capsys.readouterr().err
    assert f"{file}:4: " in error
    assert words in error
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_where_it_cannot_go(bundle: Path, tmp_path: Path) -> None:
    rows = str(write(tmp_path / "rows.jsonl", ROWS))
    link = tmp_path / "link"
    link.symlink_to(bundle)
    for folder in (link, tmp_path / "nothing", tmp_path / "rows.jsonl"):
        assert main(["capabilities", rows, str(folder)]) == 1
    with pytest.raises(InputError, match="has 1 entries"):
        read_catalogue(write(tmp_path / "one.jsonl", ROWS[:1]))
    assert main(["capabilities", str(tmp_path / "no.jsonl"), str(bundle)]) == 1
