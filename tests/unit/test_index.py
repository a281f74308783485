"""The index: Annoy, exact search, and the folder that it is saved in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from numpy.typing import NDArray

import edge.trees
from edge import ChecksumError, EdgeWarning, Hit, Index, InputError, MissingExtra, StoreError, VersionError
from edge.index import EXACT_UP_TO

N, DIM = 6000, 96


def clustered(n: int = N, dim: int = DIM, seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(150, dim))
    rows = centres[random.integers(150, size=n)] + 1.2 * random.normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def names(n: int) -> list[str]:
    return [f"row-{i}" for i in range(n)]


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    return clustered()


@pytest.fixture(scope="module")
def built(vectors: NDArray[np.float32]) -> Index:
    return Index.build(names(N), vectors, backend="annoy", encoder="an encoder")


@pytest.fixture
def saved(built: Index, tmp_path: Path) -> Path:
    built.save(tmp_path / "index")
    return tmp_path / "index"


def reference(vectors: NDArray[np.float32], query: NDArray[np.float32], k: int) -> list[int]:
    return sorted(range(len(vectors)), key=lambda row: (-np.float64(vectors[row] @ query), row))[:k]


def test_recall_on_vectors_it_has_never_seen(built: Index, vectors: NDArray[np.float32]) -> None:
    queries = clustered(100, seed=5)
    found = sum(
        len({hit.id for hit in hits} & {f"row-{row}" for row in reference(vectors, query, 10)})
        for query, hits in zip(queries, built.search(queries, 10), strict=True)
    )
    assert built.backend == "annoy"
    assert built.tuning is not None
    assert built.tuning.recall >= 0.95
    assert found / 1000 >= built.tuning.recall - 0.03  # what was measured on held-back vectors holds on others


def test_scores_are_cosines_and_the_same_for_both_back_ends(built: Index, vectors: NDArray[np.float32]) -> None:
    exact = Index.build(names(N), vectors, backend="exact")
    for query in clustered(20, seed=6):
        for hit in built.search(query, 5):
            assert hit.score == pytest.approx(float(vectors[int(hit.id[4:])] @ query), abs=1e-6)
        truth = {hit.id: hit.score for hit in exact.search(query, 50)}
        assert [truth[hit.id] for hit in built.search(query, 5) if hit.id in truth] == [
            hit.score for hit in built.search(query, 5) if hit.id in truth
        ]  # bit for bit
    assert exact.backend == "exact"


def test_exact_search_is_exact_and_ties_go_to_the_first(vectors: NDArray[np.float32]) -> None:
    twice = np.concatenate((vectors[:200], vectors[:200]))
    index = Index.build(names(400), twice)
    for query in clustered(20, seed=7):
        assert [int(hit.id[4:]) for hit in index.search(query, 8)] == reference(twice, query, 8)
    assert [hit.id for hit in index.search(twice[3], 2)] == ["row-3", "row-203"]


def test_a_matrix_gives_a_list_for_each_row(built: Index) -> None:
    queries = clustered(3, seed=8)
    assert built.search(queries, 4) == [built.search(query, 4) for query in queries]
    assert built.search(queries[:1], 4) == [built.search(queries[0], 4)]
    assert built.search(queries[:0], 4) == []
    assert isinstance(built.search(queries[0], 1)[0], Hit)


def test_the_sizes_at_which_things_end(vectors: NDArray[np.float32]) -> None:
    empty = Index.build([], np.empty((0, DIM)))
    assert empty.search(vectors[0]) == []
    assert Index.build(["a"], vectors[:1], backend="annoy").search(vectors[0], 5)[0].id == "a"
    two = Index.build(["a", "b"], vectors[:2], backend="annoy")
    assert [hit.id for hit in two.search(vectors[1], 9)] == ["b", "a"]
    same = Index.build(names(6000), np.tile(vectors[:1], (6000, 1)), backend="annoy")
    assert len(same.search(vectors[0], 100)) == 100
    assert Index.build(names(EXACT_UP_TO), clustered(EXACT_UP_TO)).backend == "exact"
    assert Index.build(names(EXACT_UP_TO + 1), clustered(EXACT_UP_TO + 1)).backend == "annoy"


def test_vectors_are_brought_to_unit_length(vectors: NDArray[np.float32]) -> None:
    index = Index.build(names(10), (vectors[:10] * 7).tolist())
    assert np.linalg.norm(index.vectors, axis=1) == pytest.approx(np.ones(10))
    assert index.search(vectors[4] * 3, 1)[0].score == pytest.approx(1)


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        (["a", "a"], np.eye(2), "'a' occurs twice"),
        (["a", ""], np.eye(2), "not a non-empty text"),
        (["a", 3], np.eye(2), "not a non-empty text"),
        (["a", "\ud800"], np.eye(2), "UTF-8"),
        ("ab", np.eye(2), "collection"),
        (["a"], np.eye(2), "1 ids for 2 vectors"),
        (["a", "b"], np.zeros((2, 2)), "no direction"),
        (["a", "b"], [[1, 2], [np.nan, 1]], "no direction"),
        (["a", "b"], [[1, 2], [1]], "rows of one length"),
        (["a", "b"], ["x", "y"], "numbers"),
        (["a"], [1.0, 2.0], "matrix"),
    ],
)
def test_bad_vectors_and_ids_are_refused(ids: Any, rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Index.build(ids, rows)


def test_bad_arguments_are_refused(built: Index, vectors: NDArray[np.float32]) -> None:
    for arguments in ({"backend": "faiss"}, {"trees": 0}, {"seed": -1}):
        with pytest.raises(InputError):
            Index.build(names(2), vectors[:2], **arguments)  # type: ignore[arg-type]
    for query, arguments in ((vectors[0], {"k": 0}), (vectors[0], {"effort": 0}), (vectors[0, :5], {})):
        with pytest.raises(InputError):
            built.search(query, **arguments)  # type: ignore[arg-type]
    for arguments in ({"recall": 0}, {"recall": 1.1}, {"k": 0}, {"k": N}):
        with pytest.raises(InputError):
            built.tune(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nothing to tune"):
        Index.build(names(2), vectors[:2]).tune()


def test_more_effort_finds_more(built: Index, vectors: NDArray[np.float32]) -> None:
    queries = clustered(50, seed=9)
    true = [set(reference(vectors, query, 10)) for query in queries]

    def recall(effort: int) -> float:
        rows, _ = built.nearest(queries, 10, effort=effort)
        return sum(len(set(row) & t) for row, t in zip(rows.tolist(), true, strict=True)) / 500

    assert recall(1) <= recall(100) <= recall(1500)
    assert recall(1500) > 0.99
    assert recall(N) == 1.0  # as good as all: exact search


def test_tuning_is_for_a_recall_and_is_saved(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    index = Index.build(names(N), vectors, backend="annoy")
    easy, hard = index.tune(0.5), index.tune(0.99)
    assert easy.effort is not None
    assert hard.effort is None or hard.effort > easy.effort
    given = index.tune(0.9, k=3, queries=clustered(40, seed=3))
    assert (given.k, given.queries) == (3, 40)
    index.save(tmp_path / "i")
    assert Index.open(tmp_path / "i").tuning == given


def test_vectors_without_structure_are_searched_exactly_and_that_is_said() -> None:
    noise = np.random.default_rng(0).normal(size=(6000, 256))
    with pytest.warns(EdgeWarning, match="too little structure"):
        index = Index.build(names(6000), noise)
    assert index.backend == "exact"
    assert index.search(noise[17], 1)[0].id == "row-17"


def test_saved_and_opened_it_finds_the_same(saved: Path, built: Index) -> None:
    opened = Index.open(saved, encoder="an encoder")
    queries = clustered(30, seed=11)
    assert opened.search(queries, 7) == built.search(queries, 7)
    assert opened.describe() == built.describe()
    assert list(opened.ids) == list(built.ids)
    assert opened.ids[-1] == f"row-{N - 1}"
    assert opened.ids[1:3] == ["row-1", "row-2"]
    with pytest.raises(IndexError):
        opened.ids[N]
    with pytest.raises(ValueError, match="read-only"):
        opened.vectors[0, 0] = 3


@pytest.mark.parametrize("threads", ["1", "2"])
def test_builds_are_deterministic_whatever_the_cores(saved: Path, tmp_path: Path, threads: str) -> None:
    program = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1]); from tests.unit.test_index import *\n"
        "from edge import Index\n"
        "Index.build(names(N), clustered(), backend='annoy', encoder='an encoder').save(sys.argv[2])"
    )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    subprocess.run([sys.executable, "-c", program, str(root), str(tmp_path / "b")], check=True, env=environment)
    assert sorted(path.name for path in saved.iterdir()) == sorted(path.name for path in (tmp_path / "b").iterdir())


def test_another_seed_gives_other_trees(built: Index, vectors: NDArray[np.float32], tmp_path: Path) -> None:
    Index.build(names(N), vectors, backend="annoy", seed=1).save(tmp_path / "other")
    built.save(tmp_path / "this")
    first, second = (next((tmp_path / name).glob("trees-*")).read_bytes() for name in ("other", "this"))
    assert first != second


def test_another_encoders_vectors_are_refused(saved: Path) -> None:
    with pytest.raises(StoreError, match="another encoder"):
        Index.open(saved, encoder="other")


@pytest.mark.parametrize("name", ["vectors", "ids", "ends", "trees", "projection", "neighbours"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_refused_even_after_it_was_checked(saved: Path, name: str, damage: str) -> None:
    Index.open(saved)
    (path,) = saved.glob(f"{name}-*")
    content = bytearray(path.read_bytes())
    status = path.stat()
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # hides it from whoever looks at times alone
    with pytest.raises(ChecksumError, match=name):
        Index.open(saved)


def test_a_changed_sidecar_is_refused(saved: Path, tmp_path: Path) -> None:
    path = saved / "index.json"
    whole = path.read_text()
    path.write_text(whole.replace('"count": 6000', '"count": 5999'))
    with pytest.raises(ChecksumError, match="has changed"):
        Index.open(saved)
    path.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(VersionError, match="format 2"):
        Index.open(saved)
    for text in ("{", "[]", "null", '{"format": "1"}'):
        path.write_text(text)
        with pytest.raises(StoreError):
            Index.open(saved)
    with pytest.raises(StoreError, match="no index here"):
        Index.open(tmp_path)


def test_saving_replaces_an_index_and_nothing_else(saved: Path, vectors: NDArray[np.float32], tmp_path: Path) -> None:
    before = Index.open(saved)
    Index.build(["only"], vectors[:1]).save(saved)
    assert len(Index.open(saved)) == 1
    assert len([path for path in saved.iterdir() if path.name != ".lock"]) == 4
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "vectors-train.npy").write_bytes(b"not ours")
    with pytest.raises(InputError, match="other files"):
        Index.build(["only"], vectors[:1]).save(theirs)
    (saved / "vectors-train.npy").write_bytes(b"not ours")
    Index.build(["only"], vectors[:1]).save(saved)
    assert (saved / "vectors-train.npy").exists()
    assert before.search(vectors[5], 1)[0].id == "row-5"  # who has it open goes on
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        before.save(tmp_path / "mine")
    with pytest.raises(InputError, match="is a file"):
        before.save(tmp_path / "mine" / "notes.txt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the size of files as a full disk would")
def test_a_full_disk_leaves_the_old_index(saved: Path) -> None:
    import resource

    before = (saved / "index.json").read_bytes()
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests.unit.test_index import clustered, names\n"
        "from edge import Index, InputError\n"
        "try: Index.build(names(9000), clustered(9000), backend='exact').save(sys.argv[2])\n"
        "except InputError as error: print(error)"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program, str(root), str(saved)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    assert "cannot be written" in result.stdout
    assert (saved / "index.json").read_bytes() == before
    assert not list(saved.glob(".partial*"))
    assert len(Index.open(saved)) == N


def test_without_annoy_the_same_is_found_and_it_is_said_once(
    saved: Path, vectors: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "annoy", None)  # as if it were not installed
    with pytest.warns(EdgeWarning, match=r"pip install 'ruvltra-edge\[annoy\]'") as said:
        index = Index.open(saved)
    assert len(said) == 1
    assert index.backend == "exact"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [int(hit.id[4:]) for hit in index.search(vectors[9], 5)] == reference(vectors, vectors[9], 5)
    with pytest.warns(EdgeWarning, match="searched exactly"):
        assert Index.build(names(N), vectors).backend == "exact"
    with pytest.raises(MissingExtra, match=r"ruvltra-edge\[annoy\]"):
        Index.build(names(N), vectors, backend="annoy")


def test_an_annoy_whose_search_is_broken_is_not_used(
    saved: Path, vectors: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fast-math has broken it: the trees are there, and the search returns the wrong items."""
    import annoy

    class Broken(annoy.AnnoyIndex):  # type: ignore[misc]
        def get_nns_by_vector(self, vector: Any, n: int, search_k: int = -1, include_distances: bool = False) -> Any:
            return super().get_nns_by_vector([-value for value in vector], n, search_k, include_distances)

    monkeypatch.setattr(annoy, "AnnoyIndex", Broken)
    for verdict in Path(os.environ["RUVLTRA_CACHE"], "indexes").iterdir():
        verdict.unlink()  # another machine: the index was never tested there
    with pytest.warns(EdgeWarning, match="does not work on this machine"):
        index = Index.open(saved)
    assert index.backend == "exact"
    assert index.search(vectors[3], 1)[0].id == "row-3"
    with pytest.warns(EdgeWarning, match="does not work on this machine"):
        assert Index.build(names(N), vectors, backend="annoy").backend == "exact"


def test_a_check_is_done_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("hashed, or searched for, again")

    monkeypatch.setattr("hashlib.file_digest", refuse)
    monkeypatch.setattr(edge.trees, "fault", refuse)
    Index.open(saved)  # saving was checking
    moved = saved.with_name("moved")
    saved.rename(moved)
    with pytest.raises(AssertionError, match="again"):
        Index.open(moved)


def test_from_eight_threads(saved: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    index = Index.open(saved)
    queries = clustered(200, seed=12)
    alone = index.search(queries, 5)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: index.search(query, 5), queries)) == alone


def test_saving_while_others_search_and_save(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    indexes = [Index.build([f"{j} {i}" for i in range(3000)], vectors[j : j + 3000], trees=5) for j in range(3)]
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            indexes[0].search(vectors[:50], 5, effort=1000)

    def save(index: Index) -> None:
        for _ in range(5):
            index.save(tmp_path / "index")

    searching = threading.Thread(target=search)
    searching.start()
    saving = [threading.Thread(target=save, args=(index,)) for index in indexes]
    for thread in saving:
        thread.start()
    for thread in saving:
        thread.join()
    done.set()
    searching.join()
    opened = Index.open(tmp_path / "index")
    j = int(opened.ids[0].split()[0])
    assert np.array_equal(opened.vectors, indexes[j].vectors)
    assert not list((tmp_path / "index").glob(".partial*"))


def test_blas_has_its_threads_back_after_builds_at_once(vectors: NDArray[np.float32]) -> None:
    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]

    before = threads()
    building = [threading.Thread(target=edge.trees.build, args=(vectors[:size], 5, 0)) for size in (2500, len(vectors))]
    for thread in building:
        thread.start()
    for thread in building:
        thread.join()
    assert threads() == before


def test_ties_go_to_the_lower_row() -> None:
    index = Index.build([str(i) for i in range(300)], np.ones((300, 4)))
    assert [hit.id for hit in index.search([1, 1, 1, 1], 5)] == ["0", "1", "2", "3", "4"]


def test_opening_reads_next_to_nothing(saved: Path) -> None:
    manifest = json.loads((saved / "index.json").read_text())
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    program = (
        "import sys, resource; import numpy, annoy; from edge import Index\n"
        "import edge.index\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "index = Index.open(sys.argv[1])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    grown = int(subprocess.check_output([sys.executable, "-c", program, str(saved)]))
    assert grown < total / 4 + 1_000_000
