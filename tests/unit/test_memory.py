"""The memory store: records, searches, and what happens when things go wrong."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge import Bundle, EdgeWarning, Encoder, InputError, MemoryStore, StoreError, VersionError
from edge.index import EXACT_UP_TO
from edge.where import condition

ROOT = Path(__file__).resolve().parents[2]
DIM = 16
TEXTS = {
    "sessions": "The login handler keeps sessions in Redis",
    "deploys": "Deploys run on GitHub Actions, from the main branch only",
    "orders": "We chose PostgreSQL for the orders, because of its transactions",
    "expired": "Error E1234 means that the token has expired",
    "lunch": "Lunch is at noon",
}


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> Encoder:
    return Encoder.load(bundle)


@pytest.fixture
def store(tmp_path: Path, encoder: Encoder) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store", encoder=encoder) as opened:
        yield opened


@pytest.fixture
def filled(store: MemoryStore) -> MemoryStore:
    for place, (name, text) in enumerate(TEXTS.items()):
        store.add(text, id=name, metadata={"place": place, "tags": [name[0], "all"], "by": {"who": name.upper()}})
    return store


def vector(seed: int) -> NDArray[np.float32]:
    row = np.random.default_rng(seed).normal(size=DIM)
    return (row / np.linalg.norm(row)).astype(np.float32)


def found(matches: Any) -> list[str]:
    return [match.record.id for match in matches]


def test_what_is_added_is_there(filled: MemoryStore) -> None:
    record = filled.get("orders")
    assert record is not None
    assert (record.text, record.metadata["place"], record.namespace) == (TEXTS["orders"], 2, "default")
    assert record.expires is None
    assert abs(record.created - time.time()) < 60
    assert filled.get("nothing") is None
    assert len(filled) == 5
    assert [record.id for record, _ in filled.records()] == list(TEXTS)


def test_the_same_text_is_remembered_once(store: MemoryStore) -> None:
    first = store.add("A fact", metadata={"from": "here"})
    assert store.add("A fact", metadata={"from": "there"}) == first
    assert len(store) == 1
    assert store.get(first).metadata == {"from": "here"}  # type: ignore[union-attr]
    assert store.add("A fact", namespace="other") == first
    assert len(store) == 2


def test_an_id_is_not_taken_over_by_mistake(filled: MemoryStore) -> None:
    with pytest.raises(InputError, match="another text's"):
        filled.add("Something else", id="orders")
    filled.add("Something else", id="orders", replace=True)
    assert filled.get("orders").text == "Something else"  # type: ignore[union-attr]
    assert found(filled.search("something else", 1)) == ["orders"]
    assert "orders" not in found(filled.search("transactions", 5, mode="text"))


def test_all_of_a_batch_or_nothing(filled: MemoryStore) -> None:
    with pytest.raises(InputError):
        filled.add_many([{"text": "new"}, {"text": "other", "id": "orders"}])
    assert len(filled) == 5
    assert filled.add_many([]) == []
    assert len(filled.add_many({"text": f"fact {i}"} for i in range(3))) == 3


def test_updating_changes_what_is_said_and_keeps_the_rest(filled: MemoryStore) -> None:
    before = filled.get("sessions")
    filled.update("sessions", metadata={"place": 9})
    filled.update("sessions", text="Sessions live in Memcached now")
    after = filled.get("sessions")
    assert before is not None
    assert after is not None
    assert (after.metadata, after.created) == ({"place": 9}, before.created)
    assert found(filled.search("Memcached", 1)) == ["sessions"]
    assert filled.search("Redis", 5, mode="text") == []
    filled.update("sessions", ttl=100)
    assert filled.get("sessions").expires == pytest.approx(time.time() + 100, abs=30)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no record 'nothing'"):
        filled.update("nothing", text="x")


def test_deleted_is_gone_from_every_search(filled: MemoryStore) -> None:
    filled.compact()
    assert filled.delete("orders") is True
    assert filled.delete("orders") is False
    for mode in ("dense", "text", "hybrid"):
        assert "orders" not in found(filled.search(TEXTS["orders"], 10, mode=mode))
    assert filled.delete_where({"tags": "all"}, keep=["lunch"]) == 3
    assert [record.id for record, _ in filled.records()] == ["lunch"]


def test_time_to_live(store: MemoryStore) -> None:
    store.add("short", id="short", ttl=0.05)
    store.add("long", id="long", ttl=1000)
    time.sleep(0.1)
    assert store.get("short") is None
    assert found(store.search("short", 5)) == ["long"]
    assert len(store) == 1
    assert store.stats()["expired"] == 1
    store.add("another text", id="short")  # the name is free again
    assert store.get("short").text == "another text"  # type: ignore[union-attr]
    store.add("brief", id="brief", ttl=0.05)
    time.sleep(0.1)
    store.compact()
    assert store.stats()["expired"] == 0


def test_namespaces_are_apart(filled: MemoryStore) -> None:
    filled.add("Deploys run on Jenkins", id="deploys", namespace="old")
    assert found(filled.search("deploys", 10, namespace="old")) == ["deploys"]
    assert len(filled.search("deploys", 10)) == 5
    assert len(filled.search("deploys", 10, namespace=None)) == 6
    assert filled.get("deploys", namespace="old").text == "Deploys run on Jenkins"  # type: ignore[union-attr]
    assert filled.stats()["namespaces"] == {"default": 5, "old": 1}


@pytest.mark.parametrize("compacted", [False, True])
def test_searching_by_meaning_by_words_and_by_both(filled: MemoryStore, compacted: bool) -> None:
    if compacted:
        filled.compact()
    assert found(filled.search("where do user sessions live?", 1)) == ["sessions"]
    assert found(filled.search("which database holds purchases", 1, mode="dense")) == ["orders"]
    assert found(filled.search("e1234", 1)) == ["expired"]
    best = filled.search("e1234", 5, mode="text")
    assert found(best) == ["expired"]
    assert (best[0].score, best[0].words, best[0].cosine) == (1.0, 1.0, None)
    dense = filled.search("e1234", 5, mode="dense")
    assert [match.score for match in dense] == sorted((match.score for match in dense), reverse=True)
    query = filled.encoder.encode(["e1234"])[0]
    for match in dense:
        assert match.words is None
        own = filled.encoder.encode([match.record.text])[0]
        assert match.score == pytest.approx(float(own @ query), abs=1e-5)
    assert found(filled.search(query, 5, mode="dense")) == found(dense)
    for match in filled.search("the token", 5):
        assert match.cosine is not None
        assert match.words is not None
        assert match.score == max(match.cosine, match.words)


def test_a_threshold_keeps_what_does_not_fit_out(filled: MemoryStore) -> None:
    assert found(filled.search("E1234 token expired", 5, min_score=0.5)) == ["expired"]
    assert filled.search("quarterly revenue of the bakery", 5, min_score=0.5) == []


def test_diversity_prefers_what_is_unlike_those_before(store: MemoryStore) -> None:
    for text in ("Deploys run on GitHub Actions", "The deploys run on GitHub Actions", "Deploys need two approvals"):
        store.add(text, id=text[:9])
    plain = found(store.search("how do deploys run on GitHub Actions", 2, mode="dense"))
    assert set(plain) == {"Deploys r", "The deplo"}
    for mode in ("dense", "hybrid"):
        spread = found(store.search("how do deploys run on GitHub Actions", 2, mode=mode, diversity=0.7))
        assert spread[1] == "Deploys n"


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ({"place": 2}, {"orders"}),
        ({"place": [0, 4]}, {"sessions", "lunch"}),
        ({"place": {"gte": 1, "lt": 3}}, {"deploys", "orders"}),
        ({"place": {"gt": 3}}, {"lunch"}),
        ({"tags": "d"}, {"deploys"}),
        ({"tags": ["d", "l"]}, {"deploys", "lunch"}),
        ({"by.who": {"contains": "sess"}}, {"sessions"}),
        ({"by.who": {"contains": "%"}}, set()),
        ({"tags": "all", "place": 1}, {"deploys"}),
        ({"nothing": None}, set(TEXTS)),
        ({"place": None}, set()),
        ({"place": "2"}, set()),
        ({"place": True}, set()),
        ({"place": []}, set()),
        ({"by": "ORDERS"}, set()),
    ],
)
def test_conditions_on_metadata(filled: MemoryStore, where: dict[str, Any], names: set[str]) -> None:
    for mode in ("dense", "hybrid"):
        assert set(found(filled.search("deploys", 10, where=where, mode=mode))) == names
    filled.compact()
    assert set(found(filled.search("deploys", 10, where=where, mode="dense"))) == names
    assert {record.id for record, _ in filled.records(where=where)} == names


@pytest.mark.parametrize(
    "where",
    [{"a": {"near": 3}}, {"a": {}}, {"a": {"gt": None}}, {"a": {"contains": 3}}, {"a": object()}, {"": 1}, {3: 1}],
)
def test_conditions_that_cannot_be(where: Any) -> None:
    with pytest.raises(InputError, match="where"):
        condition(where)


def test_conditions_cannot_break_out_of_their_statement(filled: MemoryStore) -> None:
    evil = "'; DROP TABLE documents; --"
    for where in ({evil: evil}, {"place": {"gt": evil}}, {"tags": {"contains": evil}}):
        assert filled.search("x", where=where) == []
    for name in ('a"."b', "a\\b", "a\tb", ""):
        with pytest.raises(InputError, match="where"):
            filled.search("x", where={name: 1})
    assert filled.search(evil, 1)
    assert filled.search('" OR NEAR( * ^', 1)
    filled.add("x", id=evil, namespace=evil, metadata={evil: evil})
    assert found(filled.search("x", namespace=evil, where={evil: evil})) == [evil]


def test_long_lists_odd_numbers_and_missing_values(filled: MemoryStore) -> None:
    assert set(found(filled.search("x", where={"place": list(range(1, 5000))}))) == set(TEXTS) - {"sessions"}
    assert len(filled.search("x", where={"place": [*map(str, range(5000)), 2, True]})) == 1
    assert filled.search("x", where={"place": 2**70}) == []
    assert len(filled.search("x", where={"place": {"lt": 2**70}})) == 5
    with pytest.raises(InputError, match="NaN"):
        filled.search("x", where={"place": float("nan")})
    filled.add("No place", id="none")
    assert found(filled.search("x", where={"place": None})) == ["none"]
    assert set(found(filled.search("x", where={"place": [None, 2]}))) == {"none", "orders"}
    assert found(filled.search("x", where=[{"place": {"gte": 2}}, {"place": {"lt": 3}}])) == ["orders"]
    with pytest.raises(InputError, match="fewer"):
        filled.search("x", where={f"name{i}": 1 for i in range(3000)})


WORDS = [
    "мой",
    "русский",
    "ёлка",
    "한국어",
    "がっこう",
    "άλφα",
    "ΟΔΟΣ",
    "\uff21\uff22\uff23",
    "x²",
    "ﬁnd",
    "مُحَمَّد",
    "Zürich",
    "\uff25\uff32\uff32\uff14",
]


def test_words_of_any_script_are_found(store: MemoryStore) -> None:
    """FTS5 itself splits and folds the query, whose rules are not Python's."""
    store.add_many([{"text": f"the word {word}", "id": word, "vector": [1.0, 0.0]} for word in WORDS])
    for word in WORDS:
        (match,) = store.search(word, mode="text", min_score=0.9)
        assert (match.record.id, match.words) == (word, 1.0)
    assert found(store.search("zurich", mode="text")) == ["Zürich"]
    assert found(store.search("\ud83d\ude00 word", 1, mode="text"))


def test_a_threshold_looks_further_than_the_first_ranks(store: MemoryStore) -> None:
    store.add("cat cat cat cat", vector=[1, 0])
    store.add("cat and dog " + "filler " * 300, id="both", vector=[1, 0])
    store.add_many([{"text": f"{word} {i}", "vector": [1, 0]} for word in ("cat", "dog") for i in range(200)])
    assert found(store.search("cat dog", 1, mode="text", min_score=0.9)) == ["both"]
    store.add("how to deploy the app", id="deploy", vector=[1, 0])
    (match,) = store.search("what deploy", 1, mode="text")
    assert match.record.id == "deploy"
    assert match.words is not None
    assert match.words >= 0.4  # a word that nothing has does not outweigh one that something has


def test_an_updated_text_has_the_stores_kind_of_vector(tmp_path: Path, encoder: Encoder) -> None:
    with MemoryStore(tmp_path / "a", encoder=encoder) as store:
        store.add("short", id="s", vector=[1.0, 0.0, 0.0])
        with pytest.raises(InputError, match="384 values"):
            store.update("s", text="other")
        store.update("s", text="other", vector=[0.0, 1.0, 0.0])
        assert found(store.search([0.0, 1.0, 0.0], mode="dense", min_score=0.99)) == ["s"]
        store.compact()


def test_vectors_know_what_made_them(tmp_path: Path, encoder: Encoder) -> None:
    with MemoryStore(tmp_path / "a") as store:
        store.add_many([{"text": "x", "vector": [1.0] * encoder.dim, "encoder": encoder.id}])
        with pytest.raises(StoreError, match="another encoder's"):
            store.add_many([{"text": "y", "vector": [1.0] * encoder.dim, "encoder": "0" * 64}])
        with pytest.raises(InputError, match="what made its vector"):
            store.add_many([{"text": "y", "encoder": encoder.id}])
        assert store.stats()["encoder"] == encoder.id


def test_huge_vectors_keep_their_direction(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "a") as store:
        store.add("huge", id="huge", vector=[1e38, 0.0, 1e38])
        store.add("huger", id="huger", vector=[0.0, 1e300, 0.0])
        assert store.search([1.0, 0.0, 1.0], 1, mode="dense")[0].score == pytest.approx(1)
        store.compact()
        assert store.search([0.0, 1.0, 0.0], 1, mode="dense")[0].record.id == "huger"


def test_updates_alone_are_compacted_too(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "a", compact_at=20) as store:
        store.add("x", id="x", vector=[1.0, 0.0])
        for i in range(60):
            store.update("x", metadata={"i": i})
        assert store._background is not None
        store._background.join()
        assert store.stats()["since_compacted"] < 45


def test_a_store_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    monkeypatch.chdir(tmp_path / "1")
    with MemoryStore("m") as store:
        store.add("one", id="one", vector=[1.0, 0.0])
        monkeypatch.chdir(tmp_path / "2")
        with MemoryStore("m") as other:
            other.add("two", id="two", vector=[1.0, 0.0])
        assert [record.id for record, _ in store.records()] == ["one"]
        store.compact()
        assert (tmp_path / "1" / "m" / "segments").is_dir()
        assert not (tmp_path / "2" / "m" / "segments").exists()


def test_a_closed_store_is_not_called_damaged(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "a")
    store.close()
    with pytest.raises(StoreError, match="Open the store again"):
        store.add("x", vector=[1.0])


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_store_that_may_only_be_read(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "a") as store:
        store.add("x", id="x", vector=[1.0, 0.0])
        store.compact()
    program = """
        import os, sys
        from edge import MemoryStore
        if os.getuid() == 0:
            os.setgid(65534); os.setuid(65534)
        with MemoryStore(sys.argv[1], create=False) as store:
            print(store.get("x").text, store.search([1.0, 0.0], mode="dense")[0].record.id)
            try:
                store.add("y", vector=[1.0, 0.0])
            except Exception as error:
                print(type(error).__name__)
    """
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        copy = Path(shutil.copytree(tmp_path / "a", folder / "store"))
        for path in (folder, copy, *copy.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", textwrap.dedent(program), str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert done.stdout.split() == ["x", "x", "InputError"], done.stderr
    finally:
        for path in (folder, copy, *copy.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_several_begin_a_store_at_once(tmp_path: Path) -> None:
    program = """
        import sys, time
        from edge import MemoryStore
        while time.time() < float(sys.argv[2]):
            pass
        for i in range(5):
            with MemoryStore(f"{sys.argv[1]}/{i}") as store:
                store.add(sys.argv[3], vector=[1.0, 0.0])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(time.time() + 2)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, env=environment) for i in range(4)]
    for process in started:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    for i in range(5):
        with MemoryStore(tmp_path / str(i)) as store:
            assert len(store) == 4


def test_few_that_match_among_many_are_all_found(tmp_path: Path) -> None:
    """The nearest of all are not among those that match, and the index is built of all."""
    count = EXACT_UP_TO + 1000
    with MemoryStore(tmp_path, compact_at=None) as store:
        for start in range(0, count, 1000):
            store.add_many(
                {"text": f"t{i}", "id": str(i), "vector": vector(i % 50), "metadata": {"rare": i % 1000 == 7}}
                for i in range(start, start + 1000)
            )
        for compacted in (False, True):
            if compacted:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("warnings.warn", lambda *_, **__: None)  # these vectors lie in 50 points
                    store.compact()
            for seed in (3, 7):
                hits = store.search(vector(seed), 20, mode="dense", where={"rare": True})
                assert found(hits) == [str(i) for i in range(7, count, 1000)]
        store.add("new", id="new", vector=vector(3), metadata={"rare": True})
        assert found(store.search(vector(3), 1, mode="dense", where={"rare": True})) == ["new"]


def test_many_records_by_annoy(tmp_path: Path) -> None:
    from tests.unit.test_index import clustered

    rows = clustered(7000, DIM, seed=4)
    with MemoryStore(tmp_path, compact_at=None) as store:
        store.add_many({"text": f"t{i}", "id": str(i), "vector": row} for i, row in enumerate(rows))
        before = [found(store.search(rows[i], 10, mode="dense")) for i in range(50)]
        store.compact()
        assert store.stats()["segment"]["trees"] is not None
        after = [found(store.search(rows[i], 10, mode="dense")) for i in range(50)]
    same = sum(len(set(a) & set(b)) for a, b in zip(before, after, strict=True))
    assert same / 500 > 0.9


def test_compacting_changes_nothing_that_is_found(filled: MemoryStore) -> None:
    before = filled.search("deploys of the orders", 5)
    filled.compact()
    assert filled.search("deploys of the orders", 5) == before
    filled.add("Orders are deployed on Mondays", id="new")
    filled.delete("lunch")
    assert filled.stats()["since_compacted"] == 1
    assert "new" in found(filled.search("deploys of the orders", 5))
    filled.compact()
    filled.compact()
    assert len(list((filled.folder / "segments").iterdir())) <= 2
    for name in list(TEXTS):
        filled.delete(name)
    filled.delete("new")
    filled.compact()
    assert filled.search("orders", 5) == []


def test_it_compacts_itself(tmp_path: Path) -> None:
    with MemoryStore(tmp_path, compact_at=100) as store:
        store.add_many({"text": f"t{i}", "vector": vector(i)} for i in range(100))
    with MemoryStore(tmp_path) as store:
        assert store.stats()["since_compacted"] == 0
        assert store.stats()["segment"]["count"] == 100


def test_another_process_sees_each_write_and_each_segment(tmp_path: Path) -> None:
    with MemoryStore(tmp_path) as writer, MemoryStore(tmp_path) as reader:
        for i in range(5):
            writer.add(f"t{i}", id=str(i), vector=vector(i))
            assert found(reader.search(vector(i), 1, mode="dense")) == [str(i)]
            if i % 2:
                writer.compact()
        writer.add("other", id="3", vector=vector(9), replace=True)
        assert found(reader.search(vector(9), 1, mode="dense")) == ["3"]


def test_a_damaged_segment_is_said_and_nothing_is_lost(filled: MemoryStore, encoder: Encoder) -> None:
    filled.compact()
    filled.add("The newest fact", id="new")
    (path,) = (filled.folder / "segments").glob("*/vectors-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with MemoryStore(filled.folder, encoder=encoder) as again:
        with pytest.warns(EdgeWarning, match="damaged"):
            assert found(again.search("Redis sessions", 1)) == ["sessions"]
        assert found(again.search("newest fact", 1)) == ["new"]
        assert len(again.search("fact", 10)) == 6
        again.compact()
        assert again.stats()["segment"]["count"] == 6
    with MemoryStore(filled.folder, encoder=encoder) as again:
        assert found(again.search("Redis sessions", 1)) == ["sessions"]


def test_another_encoders_store_is_refused(filled: MemoryStore, tmp_path: Path) -> None:
    other = Encoder.load(ROOT / "models" / "ruvltra-nano" / "bundle")
    with pytest.raises(StoreError, match="another encoder"):
        MemoryStore(filled.folder, encoder=other)
    with MemoryStore(tmp_path / "numbers") as store:
        store.add("t", vector=vector(1))
        with pytest.raises(InputError, match="384 values"):
            store.add("a text to embed")
        with pytest.raises(InputError, match="3 values"):
            store.search([1.0, 2.0, 3.0], mode="dense")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "no text"),
        ({"text": "  "}, "no text"),
        ({"text": 3}, "no text"),
        ({"text": "x", "id": ""}, "the id ''"),
        ({"text": "x", "id": 3}, "the id 3"),
        ({"text": "x", "id": "\ud800"}, "the id"),
        ({"text": "x", "namespace": ""}, "namespace"),
        ({"text": "x", "metadata": [1]}, "mapping"),
        ({"text": "x", "metadata": {"a": float("nan")}}, "JSON"),
        ({"text": "x", "metadata": {"a": object()}}, "JSON"),
        ({"text": "x", "ttl": 0}, "time to live"),
        ({"text": "x", "ttl": True}, "time to live"),
        ({"text": "x", "vector": [0, 0]}, "not all zero"),
        ({"text": "x", "vector": [[1.0]]}, "one row"),
        ({"text": "x", "colour": 1}, "unknown field 'colour'"),
        ("text", "no mapping"),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, record: Any, message: str) -> None:
    with MemoryStore(tmp_path / "store") as store:
        with pytest.raises(InputError, match=message):
            store.add_many([{"text": "good", "vector": vector(1)}, record])
        assert len(store) == 0


def test_bad_searches_are_refused(filled: MemoryStore) -> None:
    bad: list[dict[str, Any]] = [{"k": 0}, {"mode": "sparse"}, {"diversity": 2}, {"diversity": -0.1}]
    for arguments in bad:
        with pytest.raises(InputError):
            filled.search("x", **arguments)
    with pytest.raises(InputError, match="mode='dense'"):
        filled.search(vector(1))
    assert filled.search(" \n", 3) == []
    odd: list[dict[str, Any]] = [{"k": "3"}, {"k": 2.5}, {"k": True}, {"min_score": "x"}, {"diversity": "x"}]
    odd += [{"where": "topic=login"}, {"where": ["topic"]}, {"where": 5}, {"namespace": 5}]
    for arguments in odd:
        with pytest.raises(InputError):
            filled.search("x", **arguments)
    assert len(filled.search("x", 10**20)) == len(TEXTS)
    assert len(filled.search("x", np.int64(2), mode="dense")) == 2  # type: ignore[arg-type]
    assert filled.get("\ud800") is None
    for call in (lambda: filled.get(5), lambda: filled.delete(["a"]), lambda: filled.add_many(None)):  # type: ignore
        with pytest.raises(InputError):
            call()
    assert filled.search("\ud800", 3)


def test_odd_texts_come_back_as_they_were(store: MemoryStore) -> None:
    texts = ["naïve café", "日本語のテキスト", "emoji 🎉 and\ttabs\nlines", "a" * 100_000, "-- ' \" ; %"]
    for place, text in enumerate(texts):
        store.add(text, id=str(place))
    assert [record.text for record, _ in store.records()] == texts
    assert found(store.search("naive CAFE", 1, mode="text")) == ["0"]


def test_folders_that_are_no_stores(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no memory store here"):
        MemoryStore(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        MemoryStore(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "memory.sqlite").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(StoreError, match="damaged"):
        MemoryStore(tmp_path / "a")
    (tmp_path / "b").mkdir()
    other = sqlite3.connect(tmp_path / "b" / "memory.sqlite")
    other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(StoreError, match="another program's"):
        MemoryStore(tmp_path / "b")
    MemoryStore(tmp_path / "c").close()
    later = sqlite3.connect(tmp_path / "c" / "memory.sqlite")
    later.execute("PRAGMA user_version = 2")
    later.close()
    with pytest.raises(VersionError, match="format 2"):
        MemoryStore(tmp_path / "c")


def test_from_eight_threads(store: MemoryStore) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(worker: int) -> None:
        for i in range(10):
            store.add(f"worker {worker} fact {i}", id=f"{worker}-{i}")
            assert f"{worker}-{i}" in found(store.search(f"worker {worker} fact {i}", 10))

    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(work, range(8)):
            pass
    assert len(store) == 80


# Adds a record after another, and says which are written.
WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from edge import MemoryStore
from tests.unit.test_memory import vector
with MemoryStore(sys.argv[2], compact_at=None) as store:
    for i in range(100_000):
        store.add("x" * 20_000 + f" {i}", id=str(i), vector=vector(i))
        print(i, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills with SIGKILL")
def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A short form of `python -m benchmarks.durability --kills 300`."""
    from benchmarks.durability import kill_again_and_again

    report = kill_again_and_again(tmp_path / "store", kills=12)
    assert (report["lost"], report["halves"]) == (0, 0)
    assert report["acknowledged"] > 50
    assert report["searchable"].startswith(report["searchable"].split()[-1])  # all of those looked for


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the size of files as a full disk would")
def test_a_full_disk_is_an_error_and_the_store_intact(tmp_path: Path) -> None:
    import resource

    result = subprocess.run(
        [sys.executable, "-c", WRITER, str(ROOT), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000)),
    )
    assert result.returncode == 1
    assert "InputError" in result.stderr
    acknowledged = set(result.stdout.split())
    assert len(acknowledged) > 10
    with MemoryStore(tmp_path / "store") as store:
        assert acknowledged <= {record.id for record, _ in store.records()}
        store.add("there is room again", vector=vector(0))
        assert (
            sqlite3.connect(tmp_path / "store" / "memory.sqlite").execute("PRAGMA integrity_check").fetchone()[0]
            == "ok"
        )


def test_one_writer_and_readers_at_the_same_time(tmp_path: Path) -> None:
    """A short form of `python -m benchmarks.durability --seconds 60`: no reader ever sees a half state or an error."""
    from benchmarks.durability import concurrent

    report = concurrent(tmp_path / "store", seconds=4, readers=3)
    assert report["errors"] == []
    assert report["writes"] > 20
    assert report["searches"] > 50
    assert report["compactions"] > 0
    assert json.dumps(report)
