"""A retrieval index: unit vectors, what they are called, and the nearest of them to a query.

A folder of files that are mapped, not read, so that opening takes milliseconds and processes share the pages:
``index.json`` says what the others are, with sizes and sha256, and is written last and by one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge import trees as forest
from edge.device import cache_folder
from edge.errors import ChecksumError, EdgeWarning, InputError, MissingExtra, StoreError, VersionError
from edge.trees import Trees

FORMAT = 1
MANIFEST = "index.json"
BACKENDS = ("auto", "annoy", "exact")
EXACT_UP_TO = 2000  # vectors; the cross-over, by `python -m benchmarks.retrieval crossover`
RECALL = 0.95  # that a build is tuned for, at K
K = 10
_EFFORTS = (50, 100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600)
_HELD_BACK = 200  # vectors that tuning searches for
_SEARCHED = 0.5  # share of all vectors that trees may look at; beyond it exact search is no slower
_SCORES = 16_000_000  # cosines held at a time
_LOCK = ".lock"
_WAIT = 60.0  # seconds for another save into the same folder
_MANY = 300  # scores; sorting more takes longer than leaving most out first
_LONG = 1e18  # values whose squares float32 still has
_TIE = 1e-6  # cosines that are this close may change places by rounding
_AGAIN = "Build the index again, or copy it again from where it came from."
_FILES = {
    "vectors": ".npy",
    "ids": ".utf8",
    "ends": ".npy",
    "trees": ".ann",
    "projection": ".npy",
    "neighbours": ".npy",
}

Vector = Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float32]]
Matrix = Sequence[Sequence[float]] | np.ndarray[tuple[int, int], np.dtype[np.float32]]


class Hit(NamedTuple):
    """Something found: its id, and the cosine of its vector and the query."""

    id: str
    score: float


class Tuning(NamedTuple):
    """What :meth:`Index.tune` has measured.

    Attributes:
        effort: Chosen; None for exact search.
        recall: Share of the true nearest that it finds.
        target: What was asked for.
        k: How many nearest.
        queries: How many vectors were searched for.
    """

    effort: int | None
    recall: float
    target: float
    k: int
    queries: int


class Ids(Sequence[str]):
    """The ids of an index, in the order of its vectors; mapped, and decoded one by one."""

    def __init__(self, text: bytes | mmap.mmap, ends: NDArray[np.int64]) -> None:
        self.text = text
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(len(self))[row]]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self.at(np.array([row % len(self)]))[0]

    def at(self, rows: NDArray[np.int64]) -> list[str]:
        """The ids of some rows, counted from the first."""
        ends = self.ends.take(rows).tolist()
        starts = self.ends.take(rows - 1).tolist()
        return [
            self.text[start if row else 0 : end].decode("utf-8")
            for row, start, end in zip(rows.tolist(), starts, ends, strict=True)
        ]


class Index:
    """Finds the nearest of many unit vectors: exactly, or by Annoy with exact re-ranking. Thread-safe, immutable.

    Scores are true cosines in either case; Annoy may miss a neighbour, by the share that :meth:`tune` has measured.

    Attributes:
        ids: By row.
        vectors: (n, dim) float32, unit rows, read-only.
        encoder: What made the vectors (:attr:`edge.Encoder.id`), or None if that was not said.
        trees: None for exact search.
        tuning: The default effort, and how it was found; None for exact search.
        seed: Of the build.
    """

    def __init__(
        self,
        ids: Ids,
        vectors: NDArray[np.float32],
        encoder: str | None,
        trees: Trees | None,
        tuning: Tuning | None,
        seed: int,
    ) -> None:
        """Put the parts together; use :meth:`build` or :meth:`open`."""
        self.ids = ids
        self.vectors = vectors
        self.encoder = encoder
        self.trees = trees
        self.tuning = tuning
        self.seed = seed

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Number of values of a vector."""
        return int(self.vectors.shape[1])

    @property
    def backend(self) -> str:
        """``annoy`` or ``exact``: what :meth:`search` uses."""
        return "exact" if self.trees is None or self.tuning is None or self.tuning.effort is None else "annoy"

    @classmethod
    def build(
        cls,
        ids: Iterable[str],
        vectors: ArrayLike,
        *,
        backend: str = "auto",
        trees: int = forest.TREES,
        seed: int = 0,
        encoder: str | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Index:
        """Build an index. The same vectors and seed give the same index, on any number of cores.

        Args:
            ids: One for each vector, all different.
            vectors: (n, dim) numbers; rows are brought to unit length.
            backend: ``exact``; ``annoy``; or ``auto``: Annoy where there are enough vectors for it to pay.
            trees: Trees of Annoy.
            seed: Of Annoy's random choices.
            encoder: What made the vectors, :attr:`edge.Encoder.id`; checked when the index is opened for an encoder.
            progress: Called with the share that is done.

        Raises:
            InputError: An argument cannot be used: a vector that is zero or not finite, an id that occurs twice.
            MissingExtra: ``backend="annoy"``, and it is not installed.
        """
        if backend not in BACKENDS:
            raise InputError(f"there is no back end {backend!r}. Choose one of: {', '.join(BACKENDS)}.")
        if whole(trees, "trees") > 1000 or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise InputError(f"trees is {trees} and seed {seed}. Give 1 to 1000 trees, and a seed from 0 to 2^31 - 1.")
        names = _pack(ids)
        rows = _unit(vectors, "vectors")
        if rows.ndim != 2:
            raise InputError(f"vectors has shape {rows.shape}. Give a matrix of one row for each id.")
        if len(names) != len(rows):
            raise InputError(f"{len(names)} ids for {len(rows)} vectors. Give one id for each vector.")
        rows.flags.writeable = False
        index = cls(names, rows, encoder, None, None, seed)
        if backend == "exact" or len(rows) < 2 or (backend == "auto" and len(rows) <= EXACT_UP_TO):
            return index
        try:
            index.trees = forest.build(rows, trees, seed, progress)
        except MissingExtra as error:
            if backend == "annoy":
                raise
            warnings.warn(
                EdgeWarning(f"{error}; until then all {len(rows)} vectors are searched exactly"), stacklevel=2
            )
            return index
        problem = forest.fault(index.trees, rows)
        if problem is not None:
            index.trees = None
            _warn_of_annoy(problem)
            return index
        tuning = index.tune(RECALL, k=min(K, len(rows) - 1))
        if tuning.effort is None and len(rows) > EXACT_UP_TO:
            warnings.warn(
                EdgeWarning(
                    f"no effort finds {RECALL:.0%} of the nearest of these vectors in less time than exact search "
                    f"takes (they have too little structure), so that all {len(rows)} are searched exactly"
                ),
                stacklevel=2,
            )
        return index

    @overload
    def search(self, query: Vector, k: int = K, *, effort: int | None = None) -> list[Hit]: ...
    @overload
    def search(self, query: Matrix, k: int = K, *, effort: int | None = None) -> list[list[Hit]]: ...
    def search(self, query: ArrayLike, k: int = K, *, effort: int | None = None) -> list[Hit] | list[list[Hit]]:
        """The nearest vectors of a query, or of each of several.

        Args:
            query: (dim,) numbers; or (n, dim), whose answer is a list of lists.
            k: How many; all if there are fewer.
            effort: Candidates that Annoy looks at; None for what :meth:`tune` has chosen.

        Returns:
            ``list[Hit]`` for a vector, nearest first; ``list[list[Hit]]`` for a matrix.

        Raises:
            InputError: A query of another dimension, not finite or zero; k or effort below 1.
        """
        rows, cosines = self.nearest(query, k, effort=effort)
        hits = [
            list(map(Hit, self.ids.at(found), scores)) for found, scores in zip(rows, cosines.tolist(), strict=True)
        ]
        return hits if np.ndim(query) == 2 else hits[0]

    def nearest(
        self, queries: ArrayLike, k: int = K, *, effort: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """As :meth:`search`, as arrays: rows of :attr:`vectors` and cosines, each (queries, at most k).

        Raises:
            InputError: As for :meth:`search`.
        """
        k = whole(k, "k")
        effort = None if effort is None else whole(effort, "effort")
        matrix = self._queries(queries)
        k = min(k, len(self))
        if not k:
            return np.empty((len(matrix), 0), dtype=np.int64), np.empty((len(matrix), 0), dtype=np.float32)
        if effort is None and self.tuning is not None:
            effort = self.tuning.effort
        if self.trees is None or effort is None or effort >= _SEARCHED * len(self):
            return self._exact(matrix, k)
        rows = np.empty((len(matrix), k), dtype=np.int64)
        cosines = np.empty((len(matrix), k), dtype=np.float32)
        for i, query in enumerate(matrix):
            found = self.trees.candidates(self.vectors, query, k, effort)
            if len(found) < k:  # of many equal vectors the lists may all name the same few
                rows[i : i + 1], cosines[i : i + 1] = self._exact(query[None], k)
            else:
                rows[i], cosines[i] = self._rank(found, query, k)
        return rows, cosines

    def tune(self, recall: float = RECALL, *, k: int = K, queries: ArrayLike | None = None) -> Tuning:
        """Choose the least effort that finds a share of the true nearest; it becomes the default, and is saved.

        Args:
            recall: The share, of k.
            k: How many nearest.
            queries: (n, dim) typical queries. None takes 200 of the index's own vectors, each held back while it is
                searched for, so that what is found are its neighbours and not itself.

        Raises:
            InputError: There are no trees, or an argument is out of its range.
        """
        if self.trees is None:
            raise InputError("there is nothing to tune: all vectors are searched exactly. Build with backend='annoy'.")
        check_recall(recall)
        if whole(k, "k") >= len(self):
            raise InputError(f"k is {k}, and there are {len(self)} vectors. Give a smaller k.")
        own: list[int | None] = [None]
        if queries is None:
            held_back = np.unique(np.linspace(0, len(self) - 1, _HELD_BACK).astype(int))
            wanted, own = self.vectors[held_back], held_back.tolist()
        else:
            wanted = self._queries(queries)
            own *= len(wanted)
        # Equal vectors stand for each other, so that cosines are compared: with the least of the k best.
        least = [
            cosines[near != row][k - 1] - 1e-6
            for row, near, cosines in zip(own, *self._exact(wanted, k + 1), strict=True)
        ]
        for effort in _EFFORTS:
            if effort >= _SEARCHED * len(self):
                break
            found = 0
            for row, query, enough in zip(own, wanted, least, strict=True):
                rows = self.trees.candidates(self.vectors, query, k, effort, without=row)
                found += int((self._rank(rows, query, k)[1] >= enough).sum())
            if found >= recall * k * len(wanted):
                self.tuning = Tuning(effort, found / (k * len(wanted)), recall, k, len(wanted))
                return self.tuning
        self.tuning = Tuning(None, 1.0, recall, k, len(wanted))
        return self.tuning

    def _queries(self, queries: ArrayLike) -> NDArray[np.float32]:
        matrix = np.atleast_2d(_unit(queries, "the query"))
        if matrix.shape[1] != self.dim:
            raise InputError(
                f"the query has {matrix.shape[1]} values, the index {self.dim}. Embed it by the encoder that made the "
                "index."
            )
        return matrix

    def _exact(self, matrix: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rows = np.empty((len(matrix), k), dtype=np.int64)
        cosines = np.empty((len(matrix), k), dtype=np.float32)
        block = max(1, _SCORES // max(1, len(self)))
        for start in range(0, len(matrix), block):
            part = matrix[start : start + block]
            for i, scores in enumerate(part @ self.vectors.T if len(part) > 1 else [self.vectors @ part[0]], start):
                near = np.flatnonzero(_among_best(scores, k))
                rows[i], cosines[i] = self._rank(near, matrix[i], k)
        return rows, cosines

    def _rank(
        self, rows: NDArray[np.int64], query: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k best of some rows in ascending order, with their cosines; ties go to the lower row.

        One product a row, which rounds in one way whatever the other rows are.
        """
        cosines = np.vecdot(self.vectors.take(rows, axis=0), query)
        if len(rows) > _MANY:
            kept = np.flatnonzero(_among_best(cosines, k))
            rows, cosines = rows[kept], cosines[kept]
        order = np.argsort(-cosines, kind="stable")[:k]
        return rows[order], cosines[order]

    def save(self, folder: str | Path) -> None:
        """Write the index into a folder: a new or empty one, or one that holds an index, which is then replaced.

        Whoever has the old one open goes on with it; whoever opens sees the old or the new one, never a mixture.

        Raises:
            InputError: The folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file. Choose a folder for the index.")
        if folder.is_dir() and not (folder / MANIFEST).exists() and any(not _ours(path) for path in folder.iterdir()):
            raise InputError(f"{folder}: holds other files. Choose a new or empty folder for the index.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with exclusive(folder / _LOCK, _WAIT) as free:
                if not free:
                    raise InputError(f"{folder}: somebody else has been saving for {_WAIT:g} seconds. Try again later.")
                self._write(folder)
        except OSError as error:
            raise InputError(
                f"{folder}: the index cannot be written ({error}). Make room or choose another folder."
            ) from None

    def _write(self, folder: Path) -> None:
        partial = folder / f".partial-{os.getpid()}"
        files: dict[str, dict[str, Any]] = {}
        try:
            for name, write in self._writers().items():
                write(partial)
                with partial.open("rb+") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                    os.fsync(stream.fileno())
                file = f"{name}-{digest[:12]}{_FILES[name]}"
                files[name] = {"file": file, "bytes": partial.stat().st_size, "sha256": digest}
                partial.replace(folder / file)
            content = {
                "format": FORMAT,
                "dim": self.dim,
                "count": len(self),
                "metric": "cosine",
                "byteorder": sys.byteorder,
                "encoder": self.encoder,
                "backend": self.backend,
                "seed": self.seed,
                "trees": None if self.trees is None else self.trees.annoy.get_n_trees(),
                "tuning": None if self.tuning is None else self.tuning._asdict(),
                "tools": {"numpy": np.__version__} | ({} if self.trees is None else {"annoy": _annoy_version()}),
                "files": files,
            }
            with partial.open("w", encoding="utf-8") as stream:
                json.dump(content | {"sha256": _digest(content)}, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(folder / MANIFEST)
        finally:
            partial.unlink(missing_ok=True)
        kept = {entry["file"] for entry in files.values()}
        for path in folder.iterdir():
            if _ours(path) and path.name not in kept and not path.name.startswith(_LOCK):
                try:
                    path.unlink()
                except OSError:  # open elsewhere, on Windows; the next save tries again
                    continue
        _remember(folder, files)

    def _writers(self) -> dict[str, Callable[[Path], object]]:
        def array(values: NDArray[Any]) -> Callable[[Path], object]:
            def write(path: Path) -> None:
                with path.open("wb") as stream:
                    np.save(stream, values, allow_pickle=False)

            return write

        writers: dict[str, Callable[[Path], object]] = {
            "vectors": array(self.vectors),
            "ids": lambda path: path.write_bytes(self.ids.text[:]),
            "ends": array(self.ids.ends),
        }
        if self.trees is not None:
            writers |= {
                "trees": self.trees.save,
                "projection": array(self.trees.projection),
                "neighbours": array(self.trees.neighbours),
            }
        return writers

    @classmethod
    def open(cls, folder: str | Path, *, encoder: str | None = None) -> Index:
        """Open a saved index: check it, and map it.

        Files are hashed the first time on a device, and again whenever they have changed.

        Args:
            folder: Where it was saved.
            encoder: What will embed the queries, :attr:`edge.Encoder.id`; an index of another's vectors is refused.

        Raises:
            StoreError: There is no index here, it contradicts itself, or it is another encoder's.
            ChecksumError: A file is missing, has changed or was cut short.
            VersionError: Another format.
        """
        folder = Path(folder)
        try:
            return cls._open(folder, encoder)
        except ChecksumError:
            # Between reading index.json and opening its files another process may have replaced both.
            before = _Sidecar(folder).values
            try:
                return cls._open(folder, encoder)
            except ChecksumError:
                if _Sidecar(folder).values == before:
                    raise
                return cls._open(folder, encoder)

    @classmethod
    def _open(cls, folder: Path, encoder: str | None) -> Index:
        sidecar = _Sidecar(folder)
        values = sidecar.values
        if encoder is not None and values["encoder"] is not None and values["encoder"] != encoder:
            raise StoreError(
                f"{folder}: made of vectors of another encoder ({values['encoder'][:12]}, not {encoder[:12]}), whose "
                "cosines to this one's mean nothing. Build it again with this encoder, or use the other's bundle."
            )
        known = _verify(folder, sidecar.files)
        count, dim = values["count"], values["dim"]
        vectors = sidecar.array("vectors", np.float32, (count, dim))
        ends = sidecar.array("ends", np.int64, (count,))
        ids = Ids(sidecar.text("ids"), ends)
        if len(ids.text) != (int(ends[-1]) if count else 0):
            raise StoreError(f"{folder}: ids and their ends differ. {_AGAIN}")
        tuning = None if values["tuning"] is None else Tuning(**values["tuning"])
        index = cls(ids, vectors, values["encoder"], None, tuning, values["seed"])
        if "trees" not in sidecar.files:
            return index
        projection = sidecar.array("projection", np.float32, (dim, None))
        neighbours = sidecar.array("neighbours", np.int32, (count, None))
        try:
            trees = forest.load(folder / sidecar.files["trees"]["file"], projection, neighbours)
        except MissingExtra as error:
            warnings.warn(EdgeWarning(f"{error}; until then all {count} vectors are searched exactly"), stacklevel=3)
            return index
        except OSError as error:
            _warn_of_annoy(f"it cannot map its file ({error})")
            return index
        if not known:
            problem = forest.fault(trees, vectors)
            if problem is None and (neighbours.min() < 0 or neighbours.max() >= count):
                problem = "its neighbour lists name vectors that do not exist"
            if problem is not None:
                _warn_of_annoy(problem)
                return index
            _remember(folder, sidecar.files)
        index.trees = trees
        return index

    def describe(self) -> dict[str, Any]:
        """What there is to know of it, as JSON would have it."""
        return {
            "count": len(self),
            "dim": self.dim,
            "backend": self.backend,
            "encoder": self.encoder,
            "seed": self.seed,
            "trees": None if self.trees is None else self.trees.annoy.get_n_trees(),
            "tuning": None if self.tuning is None else self.tuning._asdict(),
        }


def _among_best(scores: NDArray[np.float32], k: int) -> NDArray[np.bool_]:
    """Which may be among the k best, once they are computed one way for all back ends; ties included."""
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    chosen: NDArray[np.bool_] = scores >= least - _TIE
    return chosen


class _Sidecar:
    """``index.json``, checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise StoreError(
                f"{folder}: no index here ({MANIFEST} is missing). Build one with: ruvltra index build"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"{path}: cannot be read ({error}). {_AGAIN}") from None
        if not isinstance(values, dict) or not isinstance(values.get("format"), int):
            raise StoreError(f"{path}: is not an index's. {_AGAIN}")
        if values["format"] != FORMAT:
            raise VersionError(
                f"{path}: format {values['format']}, but this version reads format {FORMAT}. Update ruvltra-edge, or "
                "build the index again."
            )
        if values.pop("sha256", None) != _digest(values):
            raise ChecksumError(f"{path}: has changed since it was written. {_AGAIN}")
        # What follows was written by save(), since nobody else makes the digest agree by mistake.
        if values["byteorder"] != sys.byteorder:
            raise StoreError(
                f"{folder}: was built on a {values['byteorder']}-endian machine. Build it again on this one."
            )
        self.values = values
        self.files: dict[str, dict[str, Any]] = values["files"]

    def array(self, name: str, dtype: Any, shape: tuple[int | None, ...]) -> NDArray[Any]:
        path = self.folder / self.files[name]["file"]
        try:
            values: NDArray[Any] = np.asarray(np.load(path, mmap_mode="r" if shape[0] else None, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise ChecksumError(f"{path}: cannot be mapped ({error}). {_AGAIN}") from None
        if (
            values.dtype != dtype
            or len(values.shape) != len(shape)
            or any(want is not None and want != have for want, have in zip(shape, values.shape, strict=True))
        ):
            raise StoreError(
                f"{path}: has shape {values.shape} and type {values.dtype}, which {MANIFEST} contradicts. {_AGAIN}"
            )
        return values

    def text(self, name: str) -> bytes | mmap.mmap:
        path = self.folder / self.files[name]["file"]
        try:
            with path.open("rb") as stream:
                if not self.files[name]["bytes"]:
                    return b""
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ChecksumError(f"{path}: cannot be mapped ({error}). {_AGAIN}") from None


def check_recall(recall: float) -> None:
    """Raise InputError unless it is a share above 0."""
    if not isinstance(recall, (int, float)) or not 0 < recall <= 1:
        raise InputError(f"recall is {recall!r}. Give a number above 0 and up to 1.")


def whole(value: object, what: str) -> int:
    """A whole number from 1, of whatever type.

    Raises:
        InputError: It is none.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"{what} is {value!r}. Give a whole number from 1.")
    return number


@contextlib.contextmanager
def exclusive(path: Path, wait: float = 0.0) -> Iterator[bool]:
    """A lock, over all processes and threads, that ends with its process, whatever ends it; whether it is free.

    Raises:
        OSError: It cannot be made.
    """
    import sqlite3  # whose locks work on every system

    try:
        lock = sqlite3.connect(path, timeout=wait, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise OSError(f"the lock {path.name} cannot be made: {error}") from None
    try:
        try:
            lock.execute("BEGIN EXCLUSIVE")
            free = True
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise OSError(f"the lock {path.name} cannot be taken: {error}") from None
            free = False
        except sqlite3.DatabaseError as error:
            raise OSError(f"{path.name} is no lock: {error}") from None
        yield free
    finally:
        lock.close()


def forget(folder: Path) -> None:
    """Forget that an index was checked, which is no more."""
    with contextlib.suppress(OSError):
        _verdict(folder).unlink(missing_ok=True)


def _ours(path: Path) -> bool:
    """Whether a file is one that an index writes."""
    if path.name in (_LOCK, f"{_LOCK}-journal"):
        return True
    if re.fullmatch(r"\.partial-\d+", path.name):
        return True
    name, _, rest = path.name.partition("-")
    return name in _FILES and re.fullmatch(r"[0-9a-f]{12}" + re.escape(_FILES[name]), rest) is not None


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _annoy_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("annoy")
    except PackageNotFoundError:
        return "unknown"


def _warn_of_annoy(problem: str) -> None:
    warnings.warn(
        EdgeWarning(
            f"the installed Annoy does not work on this machine ({problem}), so that all vectors are searched exactly. "
            "Compile it here: pip install --force-reinstall --no-binary annoy --no-cache-dir annoy"
        ),
        stacklevel=3,
    )


def _verdict(folder: Path) -> Path:
    return cache_folder() / "indexes" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"


def _state(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What changes when a file does (its change time cannot be set back), and Annoy's program."""
    state: dict[str, Any] = {}
    for entry in files.values():
        status = (folder / entry["file"]).stat()
        state[entry["file"]] = [entry["sha256"], status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    if "trees" in files:
        try:
            import annoy.annoylib

            status = Path(annoy.annoylib.__file__).stat()
            state["annoy"] = [status.st_size, status.st_mtime_ns]
        except ImportError:
            state["annoy"] = None
    return state


def _verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Hash the files, unless that was done and they are as they were; whether that was so.

    Raises:
        ChecksumError: One is missing, has changed or was cut short.
    """
    try:
        if json.loads(_verdict(folder).read_bytes()) == _state(folder, files):
            return True
    except (OSError, ValueError):
        pass
    for entry in files.values():
        path = folder / entry["file"]
        try:
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                digest = hashlib.file_digest(stream, "sha256").hexdigest() if size == entry["bytes"] else ""
        except OSError as error:
            raise ChecksumError(f"{path}: cannot be read ({error}). {_AGAIN}") from None
        if digest != entry["sha256"]:
            raise ChecksumError(
                f"{path}: has changed or was cut short (sha256 differs, {size} bytes, {entry['bytes']} expected). "
                f"{_AGAIN}"
            )
    if "trees" not in files:
        _remember(folder, files)
    return False


def _remember(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write down that the files are right and Annoy's search works; a cache that cannot be written is none."""
    path = _verdict(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_state(folder, files)), encoding="utf-8")
        partial.replace(path)
    except OSError:
        return


def _pack(ids: Iterable[str]) -> Ids:
    if isinstance(ids, str):
        raise InputError("ids must be a collection of texts. Put the text into a list.")
    names = list(ids)
    encoded: list[bytes] = []
    for name in names:
        if not isinstance(name, str) or not name:
            raise InputError(f"the id {name!r} is not a non-empty text. Give each vector a text for an id.")
        try:
            encoded.append(name.encode("utf-8"))
        except UnicodeEncodeError:
            raise InputError(
                f"the id {name!r} cannot be written as UTF-8. Give each vector a proper text for an id."
            ) from None
    if len(set(names)) < len(names):
        again = next(name for name in _repeated(names))
        raise InputError(f"the id {again!r} occurs twice. Give each vector an id of its own.")
    return Ids(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))


def _repeated(names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)


def floats(vectors: ArrayLike) -> NDArray[np.float32]:
    """Numbers as float32, contiguous; a copy. Rows that are too long for it are made shorter.

    Raises:
        TypeError, ValueError: They are no numbers, or rows of different lengths.
    """
    given = np.asarray(vectors)
    if given.dtype.kind not in "fiub":
        raise ValueError(given.dtype)
    with np.errstate(over="ignore"):
        rows = np.array(given, dtype=np.float32, order="C")
        if not np.abs(rows).max(initial=0.0) < _LONG and np.isfinite(given).all():
            rows = np.array(given / np.abs(given).max(axis=-1, keepdims=True), dtype=np.float32, order="C")
    return rows


def _unit(vectors: ArrayLike, what: str) -> NDArray[np.float32]:
    """Rows of unit length, float32, contiguous; a copy."""
    if isinstance(vectors, np.ndarray) and vectors.dtype == np.float32 and vectors.ndim == 1:  # a query, mostly
        square = float(np.vecdot(vectors, vectors)) if vectors.size else 0.0
        if 1 / _LONG < square < _LONG:
            row: NDArray[np.float32] = np.divide(vectors, np.float32(math.sqrt(square)), dtype=np.float32)
            return row
    try:
        rows = floats(vectors)
    except (TypeError, ValueError):
        raise InputError(f"{what} must be numbers, in rows of one length. Pass what Encoder.encode returns.") from None
    if rows.ndim not in (1, 2) or not rows.shape[-1]:
        raise InputError(f"{what} has shape {rows.shape}. Pass a vector, or a matrix of one vector a row.")
    with np.errstate(over="ignore", under="ignore"):
        squares = np.vecdot(rows, rows).astype(np.float64)
        if not np.all((squares > 1 / _LONG) & (squares < _LONG)):
            squares = np.einsum("...j,...j->...", rows, rows, dtype=np.float64)
        length = np.sqrt(squares)
    if not np.all(np.isfinite(length) & (length > 0)):
        raise InputError(f"{what} must be finite and not zero: such a vector has no direction. Leave it out.")
    rows /= length[..., None].astype(np.float32)
    return rows
