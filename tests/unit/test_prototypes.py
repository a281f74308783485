from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from edge import Agent, Bundle, Encoder, Router
from edge import prototypes as module
from edge.bundle import MANIFEST, MANIFEST_DIGEST, manifest_digest
from edge.device import cache_folder
from edge.prototypes import prototypes

AGENTS = [
    Agent("dba", "Postgres schema, indexes, slow queries.", examples=("add an index",)),
    Agent("mobile", "iOS and Android apps, Swift, Kotlin."),
    Agent("web", "React components, CSS, layout."),
]


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> Encoder:
    return Encoder.load(bundle)


def kept() -> Path:
    (path,) = (cache_folder() / "prototypes").iterdir()
    return path


def count(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is made from here on, call by call."""
    calls: list[list[str]] = []
    made = module._made

    def counted(encoder: Encoder, agents: list[Agent]) -> object:
        calls.append([agent.name for agent in agents])
        return made(encoder, agents)

    monkeypatch.setattr(module, "_made", counted)
    return calls


def test_kept_rows_are_those_made_anew(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(monkeypatch)
    first = prototypes(encoder, AGENTS)
    again = prototypes(encoder, AGENTS[::-1])
    assert calls == [["dba", "mobile", "web"]]
    assert first.dtype == np.float32
    assert (first == again[::-1]).all()
    assert np.linalg.norm(first, axis=1) == pytest.approx(1, abs=1e-6)


def test_only_what_changed_is_made(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prototypes(encoder, AGENTS)
    calls = count(monkeypatch)
    second = prototypes(encoder, [AGENTS[0], Agent("mobile", "Apps, and nothing else."), AGENTS[2]])
    assert calls == [["mobile"]]
    assert (first[[0, 2]] == second[[0, 2]]).all()
    assert not (first[1] == second[1]).all()


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "other"])
def test_a_broken_file_is_made_anew(encoder: Encoder, harm: str) -> None:
    first = prototypes(encoder, AGENTS)
    path = kept()
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes({"cut": data[:100], "flipped": data, "empty": b"", "other": b"\x93NUMPY nonsense" * 9}[harm])
    assert (prototypes(encoder, AGENTS) == first).all()
    assert kept().stat().st_size == len(data)


def test_a_folder_that_cannot_be_written_changes_nothing(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    first = prototypes(encoder, AGENTS)
    monkeypatch.setenv("RUVLTRA_CACHE", str(tmp_path / "file"))
    assert (prototypes(encoder, AGENTS) == first).all()


def test_older_ones_go_when_there_are_too_many(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 3)
    prototypes(encoder, AGENTS)
    prototypes(encoder, [Agent("other", "Something else.")])
    calls = count(monkeypatch)
    prototypes(encoder, [Agent("other", "Something else.")])
    assert calls == []
    assert len(module._kept(kept(), encoder.dim)) == 3


def test_texts_do_not_run_into_each_other(encoder: Encoder) -> None:
    rows = prototypes(encoder, [Agent("a", examples=("one", "two")), Agent("b", examples=("one\0two",))])
    assert not (rows[0] == rows[1]).all()


def test_a_bundle_with_another_graph_does_not_share(bundle: Bundle, tmp_path: Path) -> None:
    """Tokenizer and goldens, which the encoder's id is of, are the same; the vectors' last bits need not be."""
    shutil.copytree(bundle.path, tmp_path / "bundle")
    manifest = tmp_path / "bundle" / MANIFEST
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    (tmp_path / "bundle" / MANIFEST_DIGEST).write_bytes(manifest_digest(manifest.read_bytes()))
    for opened in (bundle, Bundle.open(tmp_path / "bundle")):
        assert opened.encoder_id == bundle.encoder_id
        prototypes(Encoder.load(opened), AGENTS)
    assert len(list((cache_folder() / "prototypes").iterdir())) == 2


def test_files_of_encoders_that_are_gone_go(encoder: Encoder) -> None:
    folder = cache_folder() / "prototypes"
    folder.mkdir(parents=True)
    for number in range(module._FILES + 3):
        (folder / f"{number}.npy").touch()
        os.utime(folder / f"{number}.npy", (number, number))
    prototypes(encoder, AGENTS)
    names = {path.name for path in folder.iterdir()}
    assert len(names) == module._FILES
    assert "0.npy" not in names


def test_encoders_do_not_share(encoder: Encoder, bundle: Bundle) -> None:
    nano = Router.load(bundle.path.parents[1] / "ruvltra-nano" / "bundle", agents=AGENTS)
    mini = Router.load(bundle, agents=AGENTS)
    assert len(list((cache_folder() / "prototypes").iterdir())) == 2
    assert not np.allclose(nano._rows, mini._rows, atol=0.01)
    assert (mini._rows == prototypes(encoder, AGENTS)).all()
