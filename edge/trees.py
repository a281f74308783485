"""Nearest neighbours found quickly: Annoy trees over a projection, then neighbour lists.

Annoy (Bernhardsson, 2013) gives the first candidates. It sees vectors in fewer dimensions, those of the largest
variance, so that its nodes are small and its distances cheap.
From the best candidates the search goes on to *their* nearest
neighbours, a list of which is kept for every vector, as in EFANNA (Fu and Cai, arXiv 1609.07228); two rounds
of that bring back what projection and trees have missed. Candidates are compared by true cosines, from the vectors
themselves.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.errors import MissingExtra

if TYPE_CHECKING:
    from annoy import AnnoyIndex

PROJECTED = 64  # dimensions that Annoy sees
NEIGHBOURS = 24  # of each vector
TREES = 20  # of Annoy; the neighbour lists make more of them pointless
ROUNDS = 3  # of going on to the neighbours of the best
_SHARE = 25  # Annoy's candidates to one that is gone on from
_PARTITIONS = 24  # of all vectors into groups, within which neighbours are looked for
_GROUP = 1000  # vectors of a group, at most
_SAMPLE = 20_000  # vectors that the projection is fitted on
_GRID = 4096.0  # steps of a projection's values: coarser than rounding differs from one machine to the next
_BLOCK = 4096  # vectors projected at a time
_PROBES = 8  # vectors that the self-test looks for


_BUILDING = threading.Lock()  # BLAS has one number of threads for the whole process


class Gate:
    """Lets any number in at a time, or one alone: Annoy maps its file anew when it saves, while others may search."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0

    def __enter__(self) -> None:
        with self._changed:
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            if not self._inside:
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody is inside, and keep others out."""
        with self._changed:
            self._changed.wait_for(lambda: not self._inside)
            yield


class Trees(NamedTuple):
    """Annoy's index, what it sees of a vector, and each vector's neighbours.

    Attributes:
        annoy: Over the projected vectors, by Euclidean distance.
        projection: (dim, projected) float32.
        neighbours: (n, NEIGHBOURS) int32, the vector itself first.
        gate: Entered while Annoy searches.
    """

    annoy: AnnoyIndex
    projection: NDArray[np.float32]
    neighbours: NDArray[np.int32]
    gate: Gate

    def candidates(
        self, vectors: NDArray[np.float32], query: NDArray[np.float32], k: int, effort: int, without: int | None = None
    ) -> NDArray[np.int64]:
        """Rows of vectors that may be the nearest to a query, in no order.

        Args:
            vectors: (n, dim) float32, those that the trees were built of.
            query: (dim,) float32.
            k: How many are wanted, so that there are as many candidates.
            effort: Candidates that Annoy looks at, its ``search_k``.
            without: A row that is passed over, as if it were not there.
        """
        width = max(k, effort // _SHARE)
        seen = (query @ self.projection).tolist()
        with self.gate:
            best = np.array(self.annoy.get_nns_by_vector(seen, width, effort), dtype=np.int64)
        for remaining in reversed(range(ROUNDS)):
            if without is not None:
                best = best[best != without]
            rows = self.neighbours.take(best, axis=0).ravel()
            rows.sort()
            first = np.empty(len(rows), dtype=bool)  # of its kind
            first[0] = True
            np.not_equal(rows[1:], rows[:-1], out=first[1:])
            rows = rows[first]
            if remaining == 0 or len(rows) <= width:
                kept: NDArray[np.int64] = rows.astype(np.int64)
                return kept if without is None else kept[kept != without]
            cosines = vectors.take(rows, axis=0) @ query
            best = rows[np.argpartition(cosines, len(rows) - width)[len(rows) - width :]]
        raise AssertionError("there is at least one round")

    def save(self, path: Path) -> None:
        """Write Annoy's part to a file.

        Raises:
            OSError: It cannot be written.
        """
        with self.gate.alone():
            if not self.annoy.save(str(path)):
                raise OSError("Annoy cannot write its file")


def build(
    vectors: NDArray[np.float32], trees: int, seed: int, progress: Callable[[float], None] | None = None
) -> Trees:
    """Build trees and neighbour lists.

    The result depends on vectors, number of trees and seed alone: Annoy builds on one thread, and everything else
    is done in pieces that do not depend on the number of threads, by BLAS on one thread each: its own threads and
    ours would take three times as long together.

    Args:
        vectors: (n, dim) float32, unit rows; n at least 2.
        trees: Trees of Annoy.
        seed: Of Annoy's and our choices.
        progress: Called with the share that is done.

    Raises:
        MissingExtra: Annoy is not installed, or threadpoolctl.
    """
    annoy = _annoy(min(vectors.shape[1], PROJECTED))
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise MissingExtra("building an Annoy index", "annoy") from None
    with _BUILDING, threadpool_limits(1, "blas"):
        return _grow(annoy, vectors, trees, seed, progress or (lambda _: None))


def _grow(
    annoy: AnnoyIndex, vectors: NDArray[np.float32], trees: int, seed: int, progress: Callable[[float], None]
) -> Trees:
    projection = _fit_projection(vectors)
    projected = np.empty((len(vectors), projection.shape[1]), dtype=np.float32)
    for start in range(0, len(vectors), _BLOCK):
        projected[start : start + _BLOCK] = vectors[start : start + _BLOCK] @ projection
    annoy.set_seed(seed)
    for start in range(0, len(vectors), _BLOCK):
        for row, values in enumerate(projected[start : start + _BLOCK].tolist(), start):
            annoy.add_item(row, values)
    annoy.build(trees, 1)
    return Trees(annoy, projection, _neighbours(vectors, projected, seed, progress), Gate())


def load(path: Path, projection: NDArray[np.float32], neighbours: NDArray[np.int32]) -> Trees:
    """Map a saved Annoy index.

    Raises:
        MissingExtra: Annoy is not installed.
        OSError: It cannot be mapped.
    """
    annoy = _annoy(projection.shape[1])
    annoy.load(str(path))
    return Trees(annoy, projection, neighbours, Gate())


def fault(trees: Trees, vectors: NDArray[np.float32]) -> str | None:
    """What is wrong with Annoy's search on this machine; None where all is well.

    A few vectors are looked for: each must be found, at the distances that numpy computes. Annoy is compiled with
    ``-ffast-math``, under which some compilers have broken it, and for the very processor that it was compiled on.
    """
    n = len(vectors)
    if trees.annoy.get_n_items() != n:
        return f"it holds {trees.annoy.get_n_items()} vectors, and not {n}"
    for row in np.linspace(0, n - 1, min(_PROBES, n)).astype(int):
        query = vectors[row] @ trees.projection
        rows, distances = trees.annoy.get_nns_by_vector(query.tolist(), 5, 200, True)
        true = np.linalg.norm(vectors[rows] @ trees.projection - query, axis=1)
        if not rows or not np.allclose(distances, true, atol=2e-3):  # near 0 the root of a rounding error
            return "its distances are wrong"
        if true[0] > 2e-3:
            return f"it does not find vector {row}"
    return None


def _annoy(dim: int) -> AnnoyIndex:
    try:
        from annoy import AnnoyIndex
    except ImportError:
        raise MissingExtra("an Annoy index", "annoy") from None
    return AnnoyIndex(dim, "euclidean")


def _fit_projection(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """(dim, projected) float32: the directions of the largest variance."""
    dim = vectors.shape[1]
    if dim <= PROJECTED:
        return np.eye(dim, dtype=np.float32)
    sample = vectors[:: -(-len(vectors) // _SAMPLE)].astype(np.float64)
    sample -= sample.mean(axis=0)
    directions = np.linalg.eigh(sample.T @ sample)[1][:, : -PROJECTED - 1 : -1]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
    fitted: NDArray[np.float32] = (np.round(directions * np.sign(largest) * _GRID) / _GRID).astype(np.float32)
    return fitted


def _neighbours(
    vectors: NDArray[np.float32], projected: NDArray[np.float32], seed: int, progress: Callable[[float], None]
) -> NDArray[np.int32]:
    """(n, up to NEIGHBOURS) int32: each row, then those nearest to it of all that it shared a group with."""
    n = len(vectors)
    k = min(NEIGHBOURS, n) - 1
    rows = np.zeros((n, k), dtype=np.int32)
    cosines = np.full((n, k), -2.0, dtype=np.float32)

    def look(group: NDArray[np.int32]) -> None:
        members = vectors[group]
        found = members @ members.T
        np.fill_diagonal(found, -2.0)
        take = min(k, len(group) - 1)
        near = np.argpartition(found, len(group) - take, axis=1)[:, len(group) - take :]
        both = np.concatenate((cosines[group], np.take_along_axis(found, near, axis=1)), axis=1)
        whose = np.concatenate((rows[group], group[near]), axis=1)
        order = np.argsort(whose, axis=1, kind="stable")
        both, whose = np.take_along_axis(both, order, axis=1), np.take_along_axis(whose, order, axis=1)
        again = whose[:, 1:] == whose[:, :-1]
        both[:, :-1][again] = -2.0
        best = np.argpartition(both, take, axis=1)[:, take:]
        cosines[group], rows[group] = np.take_along_axis(both, best, axis=1), np.take_along_axis(whose, best, axis=1)

    random = np.random.default_rng(seed)
    with ThreadPoolExecutor(thread_name_prefix="ruvltra-index") as pool:
        for done in range(_PARTITIONS):
            for _ in pool.map(look, _groups(np.arange(n, dtype=np.int32), projected, random)):
                pass
            progress((done + 1) / _PARTITIONS)
    # A place that was never filled leads nowhere new: it names the row itself.
    rows = np.where(cosines > -2.0, rows, np.arange(n, dtype=np.int32)[:, None])
    order = np.argsort(-cosines, axis=1, kind="stable")
    return np.concatenate((np.arange(n, dtype=np.int32)[:, None], np.take_along_axis(rows, order, axis=1)), axis=1)


def _groups(
    rows: NDArray[np.int32], projected: NDArray[np.float32], random: np.random.Generator
) -> Iterator[NDArray[np.int32]]:
    """Halve again and again, along the line between two vectors that lie far apart."""
    if len(rows) <= _GROUP:
        yield rows
        return
    drawn = projected[rows[random.integers(len(rows), size=9)]]
    far = drawn[((drawn - drawn[0]) ** 2).sum(axis=1).argmax()]
    order = np.argpartition(projected[rows] @ (far - drawn[0]), len(rows) // 2)
    yield from _groups(rows[order[: len(rows) // 2]], projected, random)
    yield from _groups(rows[order[len(rows) // 2 :]], projected, random)
