"""A living store of texts: added, changed and deleted while others search it.

SQLite holds the records (text, metadata, vector) and their words (FTS5); its transactions make a write whole or absent,
and its write-ahead log lets many processes read while one writes. Vectors are searched in a *segment*, an
:class:`edge.Index` of all records up to a certain one, and exactly in what has come since. A record's number is never
used again and its vector never changed, so that a segment only ever lacks what is newer and holds what is gone;
the latter is left out by asking SQLite. Compacting writes a new segment beside the old one and then names it in one
transaction.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge.encoder import Encoder, clean
from edge.errors import EdgeError, EdgeWarning, InputError, StoreError, VersionError
from edge.index import Index, exclusive, floats, forget, whole
from edge.where import Where, condition

MODES = ("hybrid", "dense", "text")
NAMESPACE = "default"
COMPACT_AT = 20_000  # records since the last segment; searching them exactly takes as long as the segment does
_SCHEMA = 1
_APPLICATION = 0x52564D53  # "RVMS", SQLite's application_id
_RECORDS = "memory.sqlite"
_SEGMENTS = "segments"
_OURS = (_RECORDS, _SEGMENTS)  # what the names of its files begin with
_RANK = 60  # the constant of reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009)
_WORDY = 10_000  # records that a query's words may occur in, together; more common ones are not looked for
_WAIT = 30.0  # seconds for another writer
_LONGEST = 1e12  # seconds that a record may live, some 30,000 years
_DEEPEST = 100  # levels of metadata
_FEW = 200  # records asked for by number at a time
_FIELDS = ("text", "id", "metadata", "namespace", "ttl", "vector", "encoder")
_INSERT = "INSERT INTO documents (namespace, id, text, metadata, created, expires) VALUES (?, ?, ?, ?, ?, ?)"
_INSERT_VECTOR = "INSERT INTO vectors SELECT seq, ? FROM documents WHERE namespace = ? AND id = ?"
_LIVE = "(expires IS NULL OR expires > ?)"
_COLUMNS = "seq, namespace, id, text, metadata, created, expires"

_TOKENIZER = "unicode61 remove_diacritics 2"
_TABLES = f"""
CREATE TABLE documents (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    created REAL NOT NULL,
    expires REAL,
    UNIQUE (namespace, id)
);
CREATE TABLE vectors (seq INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE INDEX documents_expires ON documents (expires) WHERE expires IS NOT NULL;
CREATE VIRTUAL TABLE words USING fts5 (
    text, content='documents', content_rowid='seq', tokenize='{_TOKENIZER}'
);
CREATE VIRTUAL TABLE vocabulary USING fts5vocab ('words', 'row');
CREATE TRIGGER documents_added AFTER INSERT ON documents BEGIN
    INSERT INTO words (rowid, text) VALUES (new.seq, new.text);
END;
CREATE TRIGGER documents_deleted AFTER DELETE ON documents BEGIN
    INSERT INTO words (words, rowid, text) VALUES ('delete', old.seq, old.text);
    DELETE FROM vectors WHERE seq = old.seq;
END;
CREATE TABLE store (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""


class Record(NamedTuple):
    """One text that is remembered.

    Attributes:
        id: Unique within its namespace.
        text: What is searched.
        metadata: What JSON can say, by name.
        namespace: A part of the store.
        created: When it was written, in seconds since 1970.
        expires: From when on it is gone, likewise; None for never.
    """

    id: str
    text: str
    metadata: dict[str, Any]
    namespace: str
    created: float
    expires: float | None


class Match(NamedTuple):
    """A record that was found.

    Attributes:
        record: What it says.
        score: What a threshold may be set on: ``cosine`` in the mode dense, ``words`` in the mode text, the greater
            of both in the mode hybrid.
        cosine: Of the record's vector and the query's; None in the mode text.
        words: Share of the query's words that the text has, rare words counting more; None in the mode dense.
    """

    record: Record
    score: float
    cosine: float | None
    words: float | None


class _Segment(NamedTuple):
    name: str
    covered: int  # the last record that it may hold
    vectors: Index
    numbers: NDArray[np.int64]  # ascending: the records' numbers by row


class MemoryStore:
    """Remembers texts in a folder, and finds them by meaning, by words, or by both.

    Any number of processes may read and write it; writers take turns. A write that has returned is on the disk.
    Thread-safe. Use it as a context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        encoder: Encoder | None = None,
        compact_at: int | None = COMPACT_AT,
        create: bool = True,
    ) -> None:
        """Open a store, or begin one.

        Args:
            folder: Where it lives; made if it is missing.
            encoder: Embeds texts and queries; None loads the one that comes with the package when it is needed. A
                store stays with the encoder of its first record.
            compact_at: New records after which :meth:`compact` runs in the background; None for never.
            create: Begin a store if there is none.

        Raises:
            StoreError: There is no store here, it is damaged, or belongs to another encoder.
            VersionError: It was written by a newer version.
            InputError: The folder holds something else, or cannot be written.
        """
        try:
            self.folder = Path(folder).absolute()  # whatever the process makes its own folder later
        except TypeError:
            raise InputError(f"the folder is {folder!r}. Give a path.") from None
        self._encoder = encoder
        self._compact_at = compact_at
        self._lock = threading.RLock()
        self._background: threading.Thread | None = None
        self._segment: _Segment | None = None
        self._since = _Recent(0)
        self._bad: str | None = None  # a segment that cannot be used
        self._counted = (0, 0)
        self._splitter = _Splitter()
        path = self.folder / _RECORDS
        try:
            there = path.is_file()
        except OSError as error:
            raise InputError(f"{path}: cannot be looked at ({error}). Check the permissions.") from None
        if not there:
            self._begin(create)
        with self._guarded():
            self._records = _connect(path)
            self._check()

    def _begin(self, create: bool) -> None:
        if not create:
            raise StoreError(f"{self.folder}: no memory store here. Add something to it first.")
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder}: is a file. Choose a folder for the store.")
        if self.folder.is_dir() and not all(item.name.startswith(_OURS) for item in self.folder.iterdir()):
            raise InputError(f"{self.folder}: holds other files. Choose a new or empty folder for the store.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be made ({error}). Choose another folder.") from None

    def _check(self) -> None:
        with self._reading():
            application = self._value("PRAGMA application_id")
            empty = not self._value("SELECT count(*) FROM sqlite_master")
        if not application and empty:
            with self._writing():
                if not self._value("SELECT count(*) FROM sqlite_master"):  # nobody else has been quicker
                    for statement in re.split(r"(?<=;)\n(?=CREATE)", _TABLES.strip()):
                        self._records.execute(statement)
                    self._records.execute(f"PRAGMA application_id = {_APPLICATION}")
                    self._records.execute(f"PRAGMA user_version = {_SCHEMA}")
            application = self._value("PRAGMA application_id")
        if application != _APPLICATION:
            raise StoreError(f"{self.folder / _RECORDS}: is another program's database. Choose another folder.")
        version = self._value("PRAGMA user_version")
        if version != _SCHEMA:
            raise VersionError(
                f"{self.folder}: written in format {version}, but this version reads {_SCHEMA}. Update ruvltra-edge."
            )
        if self._encoder is not None:
            self._check_encoder(self._encoder.id)

    def _check_encoder(self, name: str) -> None:
        stated = self._setting("encoder")
        if stated is not None and stated != name:
            raise StoreError(
                f"{self.folder}: its vectors are another encoder's ({stated[:12]}, not {name[:12]}). Open it "
                "with the bundle it was made with; or export it and import it into a new store."
            )

    @property
    def encoder(self) -> Encoder:
        """What embeds texts; loaded when it is first needed."""
        with self._lock:
            if self._encoder is None:
                encoder = Encoder.load()
                self._check_encoder(encoder.id)
                self._encoder = encoder
            return self._encoder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what runs in the background, and close the files."""
        if self._background is not None:
            self._background.join()
        with self._lock:
            self._records.close()

    def __len__(self) -> int:
        with self._lock, self._guarded():
            return int(self._value("SELECT count(*) FROM documents WHERE expires IS NULL OR expires > ?", time.time()))

    # Writing

    def add(
        self,
        text: str,
        *,
        id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        namespace: str = NAMESPACE,
        ttl: float | None = None,
        vector: ArrayLike | None = None,
        replace: bool = False,
    ) -> str:
        """Remember a text; it is on the disk when this returns.

        Args:
            text: Any text that is not blank.
            id: Its name; None for a hash of the text, so that the same text again is the same record.
            metadata: What JSON can say, by name; searches can be limited by it.
            namespace: A part of the store.
            ttl: Seconds after which it is forgotten; None for never.
            vector: (dim,) numbers, if it is known already; None embeds the text.
            replace: Put it in the place of a record of this id. Without it, the same text of the same id is left
                as it is, and another text is an error.

        Returns:
            Its id.

        Raises:
            InputError: An argument cannot be used, or the id is another text's; or the disk is full.
        """
        record = {"text": text, "id": id, "metadata": metadata, "namespace": namespace, "ttl": ttl, "vector": vector}
        return self.add_many([record], replace=replace)[0]

    def add_many(self, records: Iterable[Mapping[str, Any]], *, replace: bool = False) -> list[str]:
        """Remember several texts in one transaction: all of them, or none.

        Args:
            records: Mappings of the names of :meth:`add`'s arguments; beside a vector, ``encoder`` may say what made
                it (:attr:`edge.Encoder.id`).
            replace: As for :meth:`add`.

        Returns:
            Their ids, in order.

        Raises:
            InputError: As for :meth:`add`; nothing is added.
        """
        if isinstance(records, (str, Mapping)) or not isinstance(records, Iterable):
            raise InputError("add_many takes a collection of records. Put the record into a list, or call add.")
        drafts = [_draft(record, place) for place, record in enumerate(records, 1)]
        if not drafts:
            return []
        vectors = self._vectors(drafts)
        now = time.time()
        with self._lock, self._guarded():
            with self._writing():
                self._claim_encoder(vectors.shape[1], {draft.encoder for draft in drafts if draft.encoder is not None})
                for draft, vector in zip(drafts, vectors, strict=True):
                    self._put(draft, vector.tobytes(), now, replace)
            self._compact_soon()
        return [draft.id for draft in drafts]

    def _vectors(self, drafts: Sequence[_Draft]) -> NDArray[np.float32]:
        unknown = [draft.text for draft in drafts if draft.vector is None]
        embedded = iter(self.encoder.encode(unknown)) if unknown else iter(())
        rows = [next(embedded) if draft.vector is None else draft.vector for draft in drafts]
        if len({len(row) for row in rows}) > 1:
            raise InputError("the vectors have different numbers of values. Use one encoder for all.")
        return np.stack(rows).astype("<f4")

    def _claim_encoder(self, dim: int, made_by: Iterable[str] = ()) -> None:
        """In a transaction: the first record says what the vectors are, and what made them."""
        if self._setting("dim") is None:
            self._records.execute("INSERT INTO store VALUES ('dim', ?)", (dim,))
        elif self._setting("dim") != dim:
            raise InputError(
                f"a vector has {dim} values, the store {self._setting('dim')}. Use the encoder of its first record."
            )
        for made in ([] if self._encoder is None else [self._encoder.id], made_by):
            for name in made:
                self._check_encoder(name)
                self._records.execute("INSERT OR IGNORE INTO store VALUES ('encoder', ?)", (name,))

    def _put(self, draft: _Draft, vector: bytes, now: float, replace: bool) -> None:
        expires = None if draft.ttl is None else now + draft.ttl
        old = self._row(
            "SELECT seq, text, expires FROM documents WHERE namespace = ? AND id = ?", draft.namespace, draft.id
        )
        if old is not None:
            gone = old[2] is not None and old[2] <= now
            if not gone and not replace:
                if old[1] == draft.text:
                    return
                raise InputError(
                    f"the id {draft.id!r} is another text's. Choose another id, or replace the text: update, or "
                    "replace=True."
                )
            self._records.execute("DELETE FROM documents WHERE seq = ?", (old[0],))
        self._insert(draft, vector, now, expires)

    def _insert(self, draft: _Draft, vector: bytes, created: float, expires: float | None) -> None:
        self._records.execute(_INSERT, (draft.namespace, draft.id, draft.text, draft.metadata, created, expires))
        self._records.execute(_INSERT_VECTOR, (vector, draft.namespace, draft.id))

    def update(
        self,
        id: str,
        *,
        text: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        ttl: float | None = None,
        vector: ArrayLike | None = None,
        namespace: str = NAMESPACE,
    ) -> None:
        """Change a record; what is None stays as it is, but that another text is embedded anew.

        Raises:
            InputError: There is no such record, or an argument cannot be used.
        """
        rows = None
        if text is not None or vector is not None:
            rows = self._vectors([_draft({"text": "-" if text is None else text, "vector": vector}, 1)])
        now = time.time()
        with self._lock, self._guarded(), self._writing():
            if rows is not None:
                self._claim_encoder(rows.shape[1])
            old = self._row(
                f"SELECT {_COLUMNS}, vector FROM documents JOIN vectors USING (seq) "
                f"WHERE namespace = ? AND id = ? AND {_LIVE}",
                namespace,
                id,
                now,
            )
            if old is None:
                raise InputError(f"there is no record {id!r} in the namespace {namespace!r}. Add it first.")
            kept = {
                "text": old[3] if text is None else text,
                "metadata": json.loads(old[4]) if metadata is None else metadata,
                "id": id,
                "namespace": namespace,
                "ttl": ttl,
            }
            draft = _draft(kept, 1)
            expires = old[6] if ttl is None else now + ttl
            self._records.execute("DELETE FROM documents WHERE seq = ?", (old[0],))
            self._insert(draft, old[7] if rows is None else rows[0].tobytes(), old[5], expires)
        with self._lock, self._guarded():
            self._compact_soon()

    def delete(self, id: str, *, namespace: str = NAMESPACE) -> bool:
        """Forget a record; whether there was one."""
        with self._lock, self._guarded(), self._writing():
            values = (_name(namespace, "namespace"), _name(id, "id"), time.time())
            return (
                self._records.execute(
                    f"DELETE FROM documents WHERE namespace = ? AND id = ? AND {_LIVE}", values
                ).rowcount
                > 0
            )

    def delete_where(self, where: Where, *, namespace: str | None = NAMESPACE, keep: Iterable[str] = ()) -> int:
        """Forget the records whose metadata match, but for those of some ids; how many there were.

        Args:
            where: As for :meth:`search`; with none (``{}``) all records match.
            namespace: A part of the store; None for all.
            keep: Ids that stay.

        Raises:
            InputError: A condition that cannot be.
        """
        matching, values = condition(where, None if namespace is None else _name(namespace, "namespace"))
        kept = set(keep)
        with self._lock, self._guarded(), self._writing():
            rows = self._records.execute(f"SELECT seq, id FROM documents d WHERE true{matching}", values).fetchall()
            gone = [(seq,) for seq, name in rows if name not in kept]
            self._records.executemany("DELETE FROM documents WHERE seq = ?", gone)
        return len(gone)

    # Reading

    def get(self, id: str, *, namespace: str = NAMESPACE) -> Record | None:
        """The record of an id; None if there is none, or no longer."""
        with self._lock, self._guarded():
            row = self._row(
                f"SELECT {_COLUMNS} FROM documents WHERE namespace = ? AND id = ? AND {_LIVE}",
                _name(namespace, "namespace"),
                _name(id, "id"),
                time.time(),
            )
        return None if row is None else _record(row)

    def records(
        self, *, namespace: str | None = None, where: Where | None = None
    ) -> Iterator[tuple[Record, NDArray[np.float32]]]:
        """All records as they are now, oldest first, each with its vector; of all namespaces, or of one."""
        matching, values = condition(where or {}, namespace)
        with self._guarded():
            reader = _connect(self.folder / _RECORDS)
        try:
            with self._guarded():
                rows = reader.execute(
                    f"SELECT {_COLUMNS}, vector FROM documents d JOIN vectors USING (seq) "
                    f"WHERE {_LIVE}{matching} ORDER BY seq",
                    (time.time(), *values),
                )
                for row in rows:
                    yield _record(row), np.frombuffer(row[7], dtype="<f4")
        finally:
            reader.close()

    def search(
        self,
        query: str | ArrayLike,
        k: int = 10,
        *,
        mode: str = "hybrid",
        where: Where | None = None,
        namespace: str | None = NAMESPACE,
        min_score: float | None = None,
        diversity: float = 0.0,
    ) -> list[Match]:
        """The records that fit a query best.

        Args:
            query: A text; or a vector, in the mode dense.
            k: How many at most.
            mode: ``dense``: by cosine. ``text``: by BM25 of the words. ``hybrid``: by the sum of reciprocal ranks in
                both.
            where: By name of metadata: a value; a list of values, any of which will do; ``{"gte": 3, "lt": 5}`` (also
                ``gt``, ``lte``); ``{"contains": "text"}``, whatever its case; or None for what is missing. All must
                hold, and of a list of such mappings all of them. A list in the metadata matches by any of its values;
                ``a.b`` is b within a.
            namespace: A part of the store; None for all.
            min_score: Leave out what has a lower :attr:`Match.score`.
            query: A blank one finds nothing.
            diversity: From 0 to 1: how much a record loses for being like those before it (maximal marginal relevance,
                Carbonell and Goldstein, SIGIR 1998).

        Raises:
            InputError: An argument cannot be used.
        """
        if mode not in MODES:
            raise InputError(f"there is no mode {mode!r}. Choose one of: {', '.join(MODES)}.")
        k = whole(k, "k")
        for what, value, wanted_of in (("diversity", diversity, "from 0 to 1"), ("min_score", min_score, "")):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise InputError(f"{what} is {value!r}. Give a number{wanted_of and ' ' + wanted_of}.")
        if not 0 <= diversity <= 1:
            raise InputError(f"diversity is {diversity}. Give a number from 0 to 1.")
        if not isinstance(query, str) and mode != "dense":
            raise InputError(f"the mode {mode} needs a text to search for. Use mode='dense' for a vector.")
        if isinstance(query, str):
            query = clean(query)
            if not query.strip():
                return []
        vector = None
        if mode != "text":
            vector = self.encoder.encode([query])[0] if isinstance(query, str) else _unit(query)
        matching, values = condition(where or {}, None if namespace is None else _name(namespace, "namespace"))
        k = min(k, 10**6)
        wanted = k if mode != "hybrid" and not diversity else 4 * k + 20
        with self._lock, self._guarded(), self._reading():
            if isinstance(query, str) and mode != "text" and self._encoder is not None:
                self._check_encoder(self._encoder.id)
            search = _Search(self._records, self._splitter, matching, values, time.time(), self._count())
            while True:
                dense = [] if vector is None else self._dense(search, vector, wanted)
                text = search.by_words(query, wanted) if isinstance(query, str) and mode != "dense" else []
                fused = _fuse(dense, text)
                rows = search.rows(list(fused))
                shares = dict.fromkeys(fused) if mode == "dense" else search.shares(rows)
                vectors = {seq: np.frombuffer(rows[seq][7], dtype="<f4") for seq in fused}
                matches = {}
                for seq in fused:
                    cosine = None if vector is None else float(np.einsum("i,i->", vectors[seq], vector))
                    score = max(value for value in (cosine, shares[seq]) if value is not None)
                    if min_score is None or score >= min_score:
                        matches[seq] = Match(_record(rows[seq]), score, cosine, shares[seq])
                if min_score is None or mode == "dense" or len(matches) >= k or wanted > max(len(dense), len(text)):
                    break
                wanted *= 4  # the threshold is on another score than the ranks: look further down
        order = sorted(matches, key=lambda seq: (-fused[seq], seq))
        if mode == "dense":
            order.sort(key=lambda seq: (-matches[seq].score, seq))
        if diversity:
            best = max(fused.values(), default=1.0)
            relevance = {seq: matches[seq].score if mode == "dense" else fused[seq] / best for seq in order}
            order = _spread(order, relevance, vectors, k, diversity)
        return [matches[seq] for seq in order[:k]]

    def _count(self) -> int:
        """How many records there are, or were when the newest was written: counting takes longer than a search."""
        newest = int(self._value("SELECT coalesce(max(seq), 0) FROM documents"))
        if self._counted[0] != newest:
            self._counted = newest, int(self._value("SELECT count(*) FROM documents"))
        return self._counted[1]

    def _dense(self, search: _Search, vector: NDArray[np.float32], k: int) -> list[int]:
        """Numbers of the nearest records that match, nearest first; in a transaction."""
        self._refresh()
        if self._since.dim not in (None, len(vector)) or (
            self._segment is not None and self._segment.vectors.dim != len(vector)
        ):
            raise InputError(
                f"the query has {len(vector)} values, other than the store's vectors. Use the store's encoder."
            )
        available = len(self._since) + (0 if self._segment is None else len(self._segment.vectors))
        wide = k + 16
        while True:
            numbers, cosines = self._since.nearest(vector, wide)
            if self._segment is not None and len(self._segment.vectors):
                rows, near = self._segment.vectors.nearest(vector, wide)
                numbers = np.concatenate((self._segment.numbers[rows[0]], numbers))
                cosines = np.concatenate((near[0], cosines))
            order = np.lexsort((numbers, -cosines))[:wide]
            live = search.matching(numbers[order].tolist())
            found = [seq for seq in numbers[order].tolist() if seq in live]
            if len(found) >= k or wide >= available:
                return found[:k]
            if wide > 20 * k:  # few match: rather all of those than ever more of the others
                return self._among(search.all(), vector, k)
            wide *= 4

    def _among(self, numbers: NDArray[np.int64], vector: NDArray[np.float32], k: int) -> list[int]:
        """The nearest of these records, exactly."""
        cosines = np.full(len(numbers), -2.0, dtype=np.float32)
        if self._segment is not None and len(self._segment.vectors):
            place = np.searchsorted(self._segment.numbers, numbers)
            place[place == len(self._segment.numbers)] = 0
            held = self._segment.numbers[place] == numbers
            cosines[held] = self._segment.vectors.vectors[place[held]] @ vector
        recent, near = self._since.cosines(vector)
        place = np.searchsorted(recent, numbers)
        held = place < len(recent)
        held[held] = recent[place[held]] == numbers[held]
        cosines[held] = near[place[held]]
        chosen: list[int] = numbers[np.lexsort((numbers, -cosines))[:k]].tolist()
        return chosen

    def _refresh(self) -> None:
        """Have the segment that is named, and the vectors of all that is newer; in a transaction."""
        name = self._setting("segment")
        if name != (None if self._segment is None else self._segment.name) and name != self._bad:
            problem = None
            try:
                self._segment = None if name is None else self._open_segment(name)
            except EdgeError as error:
                self._segment, self._bad, problem = None, name, str(error)
            covered = 0 if self._segment is None else self._segment.covered
            if covered != self._since.after:
                self._since = _Recent(covered)
            if problem is not None:
                warnings.warn(
                    EdgeWarning(
                        f"{self.folder / _SEGMENTS / str(name)}: the index is damaged ({problem}) Until it is built "
                        "anew from the records, by compact(), all of them are searched exactly; none is lost"
                    ),
                    stacklevel=4,
                )
        self._since.extend(
            self._records.execute("SELECT seq, vector FROM vectors WHERE seq > ? ORDER BY seq", (self._since.last,))
        )

    def _open_segment(self, name: str) -> _Segment:
        index = Index.open(self.folder / _SEGMENTS / name, encoder=self._setting("encoder"))
        numbers = np.frombuffer(bytes.fromhex(bytes(index.ids.text[:]).decode("ascii")), dtype=">i8").astype(np.int64)
        return _Segment(name, int(name.partition("-")[0]), index, numbers)

    # Keeping house

    def compact(self, progress: Callable[[float], None] | None = None) -> bool:
        """Build a new segment of all records, and forget for good what has expired.

        Others go on reading and writing meanwhile.

        Returns:
            Whether it was done; False if another process is at it.

        Raises:
            InputError: There is no room, or the folder is gone.
        """
        try:
            with exclusive(self.folder / f"{_SEGMENTS}.lock") as free:
                if free:
                    self._rebuild(progress)
                return free
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be compacted ({error}). Make room.") from None

    def _rebuild(self, progress: Callable[[float], None] | None) -> None:
        numbers: list[int] = []
        vectors: list[bytes] = []
        with self._guarded():
            reader = _connect(self.folder / _RECORDS)
        try:
            with self._guarded():
                reader.execute("BEGIN")
                now = time.time()
                last = reader.execute("SELECT coalesce(max(seq), 0) FROM documents").fetchone()[0]
                settings = dict(reader.execute("SELECT key, value FROM store"))
                for seq, vector in reader.execute(
                    f"SELECT seq, vector FROM documents JOIN vectors USING (seq) WHERE {_LIVE} ORDER BY seq", (now,)
                ):
                    numbers.append(seq)
                    vectors.append(vector)
                reader.execute("COMMIT")
        finally:
            reader.close()
        if not numbers and settings.get("segment") is None:
            return
        matrix = np.frombuffer(b"".join(vectors), dtype="<f4").reshape(len(numbers), int(settings["dim"]))
        del vectors
        index = Index.build(
            [f"{seq:016x}" for seq in numbers], matrix, encoder=settings.get("encoder"), progress=progress
        )
        folder = self.folder / _SEGMENTS
        for left in folder.glob(".building-*"):  # by a process that did not live to end it: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        building = folder / f".building-{os.getpid()}"
        index.save(building)
        name = f"{last}-{os.urandom(4).hex()}"
        building.rename(folder / name)
        forget(building)
        with self._lock, self._guarded():
            with self._writing():
                self._records.execute("DELETE FROM documents WHERE expires <= ?", (now,))
                self._records.execute("INSERT OR REPLACE INTO store VALUES ('segment', ?)", (name,))
            self._bad = None
        for old in folder.iterdir():  # but the one before, which somebody may be about to open
            if old.name not in (name, settings.get("segment")):
                shutil.rmtree(old, ignore_errors=True)
                forget(old)

    def _compact_soon(self) -> None:
        if self._compact_at is None or (self._background is not None and self._background.is_alive()):
            return
        covered = int((self._setting("segment") or "0").partition("-")[0])
        newest = int(self._value("SELECT coalesce(max(seq), 0) FROM documents"))
        if newest - covered < self._compact_at:
            return

        def work() -> None:
            try:
                self.compact()
            except EdgeError as error:  # the next write tries again
                warnings.warn(EdgeWarning(f"compacting in the background failed: {error}"), stacklevel=1)

        self._background = threading.Thread(target=work, name="ruvltra-compact", daemon=True)
        self._background.start()

    def stats(self) -> dict[str, Any]:
        """How much there is, of what, and how it is searched."""
        with self._lock, self._guarded(), self._reading():
            now = time.time()
            segment = self._setting("segment")
            covered = int((segment or "0").partition("-")[0])
            values: dict[str, Any] = {
                "records": int(self._value("SELECT count(*) FROM documents WHERE expires IS NULL OR expires > ?", now)),
                "expired": int(self._value("SELECT count(*) FROM documents WHERE expires <= ?", now)),
                "namespaces": dict(
                    self._records.execute(
                        f"SELECT namespace, count(*) FROM documents WHERE {_LIVE} GROUP BY namespace",
                        (now,),
                    ).fetchall()
                ),
                "dim": self._setting("dim"),
                "encoder": self._setting("encoder"),
                "since_compacted": int(self._value("SELECT count(*) FROM documents WHERE seq > ?", covered)),
            }
            self._refresh()
            values["segment"] = None if self._segment is None else self._segment.vectors.describe()
        values["bytes"] = 0
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process has just compacted
                values["bytes"] += path.stat().st_size if path.is_file() else 0
        return values

    # SQLite

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "busy" in str(error):
                raise StoreError(
                    f"{self.folder}: another process has been writing for {_WAIT:g} seconds. Try again when it is done."
                ) from None
            if "too large" in str(error) or "too many" in str(error):
                raise InputError(f"the condition is beyond SQLite ({error}). Give fewer values.") from None
            if "no such module: fts5" in str(error):
                raise StoreError("this Python's SQLite has no FTS5. Use a Python whose SQLite has it.") from None
            raise InputError(
                f"{self.folder}: cannot be read or written ({error}). Make room, or check permissions."
            ) from None
        except sqlite3.ProgrammingError as error:
            raise StoreError(f"{self.folder}: cannot be used ({error}). Open the store again.") from None
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"{self.folder / _RECORDS}: damaged ({error}). Restore it from a copy or an export."
            ) from None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._records.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._records.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite itself rolls back on some errors
                self._records.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        self._records.execute("BEGIN")
        try:
            yield
        finally:
            self._records.execute("COMMIT")

    def _row(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._records.execute(statement, values).fetchone()
        return row

    def _value(self, statement: str, *values: object) -> Any:
        row = self._row(statement, *values)
        return None if row is None else row[0]

    def _setting(self, key: str) -> Any:
        return self._value("SELECT value FROM store WHERE key = ?", key)


class _Search:
    """What one search asks of SQLite, within one transaction."""

    def __init__(
        self,
        records: sqlite3.Connection,
        splitter: _Splitter,
        condition: str,
        values: Sequence[object],
        now: float,
        total: int,
    ) -> None:
        self._records = records
        self._splitter = splitter
        self._total = total
        self._condition = f" AND (d.expires IS NULL OR d.expires > ?){condition}"
        self._values = (now, *values)
        self._weights: dict[str, float] = {}

    def matching(self, numbers: Sequence[int]) -> set[int]:
        """Those of some records that are still there and match."""
        found: set[int] = set()
        for start in range(0, len(numbers), _FEW):
            some = numbers[start : start + _FEW]
            marks = ",".join("?" * len(some))
            rows = self._records.execute(
                f"SELECT seq FROM documents d NOT INDEXED WHERE seq IN ({marks}){self._condition}",
                (*some, *self._values),
            )
            found.update(row[0] for row in rows)
        return found

    def all(self) -> NDArray[np.int64]:
        """The numbers of all that match, ascending."""
        rows = self._records.execute(
            f"SELECT seq FROM documents d WHERE true{self._condition} ORDER BY seq", self._values
        )
        return np.array([row[0] for row in rows], dtype=np.int64)

    def by_words(self, query: str, k: int) -> list[int]:
        """The best by BM25, best first."""
        total = self._total
        frequency: dict[str, int] = {}
        for word in dict.fromkeys(self._splitter.split([query])[0]):
            row = self._records.execute("SELECT doc FROM vocabulary WHERE term = ?", (word,)).fetchone()
            frequency[word] = 0 if row is None else row[0]
        sought: list[str] = []
        scanned = 0
        for word in sorted((word for word in frequency if frequency[word]), key=frequency.__getitem__):
            scanned += frequency[word]
            if sought and scanned > _WORDY:
                break
            sought.append(word)
        if not sought:
            return []
        # Inverse document frequency, as BM25 has it; a word that no record has weighs as those that some have do.
        idf = {word: math.log(1 + (total - n + 0.5) / (n + 0.5)) for word, n in frequency.items() if n}
        mean = sum(idf.values()) / len(idf)
        self._weights = {word: idf.get(word, mean) for word in frequency}
        any_of = " OR ".join(f'"{word}"' for word in sought)
        wide = 2 * k + 16
        rows = self._records.execute(
            "SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words), rowid LIMIT ?", (any_of, wide)
        )
        best = [row[0] for row in rows]
        live = self.matching(best)
        found = [seq for seq in best if seq in live][:k]
        if len(found) == k or len(best) < wide:
            return found
        rows = self._records.execute(
            "SELECT seq FROM words JOIN documents d ON d.seq = words.rowid "
            f"WHERE words MATCH ?{self._condition} ORDER BY bm25(words), seq LIMIT ?",
            (any_of, *self._values, k),
        )
        return [row[0] for row in rows]

    def shares(self, rows: Mapping[int, Sequence[Any]]) -> dict[int, float]:
        """Of the query's words, by weight, what each record's text has."""
        total = sum(self._weights.values())
        if not total:
            return dict.fromkeys(rows, 0.0)
        words = map(set, self._splitter.split([row[3] for row in rows.values()]))
        return {
            seq: sum(weight for word, weight in self._weights.items() if word in have) / total
            for seq, have in zip(rows, words, strict=True)
        }

    def rows(self, numbers: Sequence[int]) -> dict[int, tuple[Any, ...]]:
        """Whole records, by number."""
        found = {}
        for start in range(0, len(numbers), _FEW):
            some = numbers[start : start + _FEW]
            marks = ",".join("?" * len(some))
            for row in self._records.execute(
                f"SELECT {_COLUMNS}, vector FROM documents JOIN vectors USING (seq) WHERE seq IN ({marks})", some
            ):
                found[row[0]] = row
        return found


class _Splitter:
    """Splits texts into words and folds these, by FTS5 itself, so that they are the words that it indexes."""

    def __init__(self) -> None:
        self._texts = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        try:
            self._texts.execute(f"CREATE VIRTUAL TABLE texts USING fts5 (text, content='', tokenize='{_TOKENIZER}')")
            self._texts.execute("CREATE VIRTUAL TABLE terms USING fts5vocab ('texts', 'instance')")
        except sqlite3.OperationalError as error:
            raise StoreError(f"this Python's SQLite has no FTS5 ({error}). Use a Python whose SQLite has it.") from None

    def split(self, texts: Sequence[str]) -> list[list[str]]:
        """The words of each text, in order."""
        found: list[list[str]] = [[] for _ in texts]
        self._texts.execute("BEGIN")
        try:
            self._texts.executemany("INSERT INTO texts (rowid, text) VALUES (?, ?)", list(enumerate(texts)))
            for place, word in self._texts.execute("SELECT doc, term FROM terms ORDER BY doc, offset"):
                found[place].append(word)
        finally:
            self._texts.execute("ROLLBACK")
        return found


class _Recent:
    """Vectors of the records after a certain one, in memory, in the order of their numbers."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.last = after
        self.dim: int | None = None
        self._numbers = np.empty(0, dtype=np.int64)
        self._vectors = np.empty((0, 0), dtype=np.float32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def extend(self, rows: Iterable[tuple[int, bytes]]) -> None:
        for seq, data in rows:
            vector = np.frombuffer(data, dtype="<f4")
            if self.dim is None:
                self.dim = len(vector)
                self._vectors = np.empty((0, self.dim), dtype=np.float32)
            if self._count == len(self._numbers):
                room = max(64, self._count)
                self._numbers = np.concatenate((self._numbers, np.empty(room, dtype=np.int64)))
                self._vectors = np.concatenate((self._vectors, np.empty((room, self.dim), dtype=np.float32)))
            self._numbers[self._count], self._vectors[self._count] = seq, vector
            self._count += 1
            self.last = seq

    def cosines(self, vector: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Of all of them: numbers, ascending, and cosines."""
        if not self._count:
            return self._numbers[:0], np.empty(0, dtype=np.float32)
        return self._numbers[: self._count], self._vectors[: self._count] @ vector

    def nearest(self, vector: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Of the k nearest, in no order."""
        numbers, cosines = self.cosines(vector)
        if len(numbers) > k:
            best = np.argpartition(cosines, len(numbers) - k)[len(numbers) - k :]
            return numbers[best], cosines[best]
        return numbers, cosines


class _Draft(NamedTuple):
    text: str
    id: str
    metadata: str
    namespace: str
    ttl: float | None
    vector: NDArray[np.float32] | None
    encoder: str | None


def _draft(record: Mapping[str, Any], place: int) -> _Draft:
    """A record to be written, checked."""
    if not isinstance(record, Mapping):
        raise InputError(f"record {place} is no mapping of names to values. Give at least its text.")
    for key in record:
        if key not in _FIELDS:
            raise InputError(f"record {place} has the unknown field {key!r}. Known fields: {', '.join(_FIELDS)}.")
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"record {place} has no text. Give it one that is not blank.")
    text = clean(text).replace("\0", "")
    if not text.strip():
        raise InputError(f"record {place} has no text. Give it one that is not blank.")
    name = record.get("id")
    if name is None:
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
    namespace = record.get("namespace")
    namespace = NAMESPACE if namespace is None else namespace
    for what, value in (("id", name), ("namespace", namespace)):
        if not isinstance(value, str) or not value or "\0" in value or value != clean(value):
            raise InputError(f"record {place} has the {what} {value!r}. Give a text that is not empty.")
    if namespace == "*":
        raise InputError(f"record {place} has the namespace '*', which stands for all. Give another.")
    metadata = record.get("metadata")
    if metadata is not None and not (isinstance(metadata, Mapping) and all(isinstance(key, str) for key in metadata)):
        raise InputError(f"record {place}: metadata must be a mapping of texts to values. Correct it.")
    try:
        packed = clean(json.dumps(dict(metadata or {}), ensure_ascii=False, allow_nan=False))
        _check_depth(json.loads(packed))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"record {place}: JSON cannot say its metadata ({error}). Use texts, numbers, lists."
        ) from None
    ttl = record.get("ttl")
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 < ttl < _LONGEST):
        raise InputError(f"record {place} has the time to live {ttl!r}. Give seconds above 0, up to 10^12.")
    vector, encoder = record.get("vector"), record.get("encoder")
    if encoder is not None and (not isinstance(encoder, str) or vector is None):
        raise InputError(f"record {place} has the encoder {encoder!r}. Give the id of what made its vector, and that.")
    return _Draft(text, name, packed, namespace, ttl, None if vector is None else _unit(vector), encoder)


def _check_depth(value: Any, depth: int = 0) -> None:
    """Raise ValueError for what SQLite's JSON cannot take: very deep nesting, and the character NUL."""
    if depth > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} deep")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("the character NUL")
    if isinstance(value, dict):
        for name in value:
            _check_depth(name, depth + 1)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, depth + 1)


def _name(name: object, what: str) -> str:
    """An id or a namespace that can be asked for."""
    if not isinstance(name, str):
        raise InputError(f"the {what} {name!r} is no text. Give a text.")
    return clean(name)


def _unit(vector: ArrayLike) -> NDArray[np.float32]:
    try:
        row = floats(vector)
    except (TypeError, ValueError):
        raise InputError("a vector must be a row of numbers. Pass what Encoder.encode returns.") from None
    length = float(np.linalg.norm(row.astype(np.float64)))
    if row.ndim != 1 or not np.isfinite(length) or not length:
        raise InputError(
            "a vector must be one row of finite numbers, not all zero. Pass a row of what Encoder.encode returns."
        )
    return row if abs(length - 1) < 1e-6 else row / np.float32(length)  # what was exported comes back bit for bit


def _record(row: Sequence[Any]) -> Record:
    return Record(row[2], row[3], json.loads(row[4]), row[1], row[5], row[6])


def _connect(path: Path) -> sqlite3.Connection:
    """A connection; to a store that may not be written, one that reads."""
    writable = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    if writable:
        records = sqlite3.connect(path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
    else:
        # Without a log nobody is writing, and SQLite need not make the files by which writers and readers agree.
        log = path.with_name(f"{path.name}-wal")
        still = "" if log.exists() and log.stat().st_size else "&immutable=1"
        records = sqlite3.connect(
            f"{path.as_uri()}?mode=ro{still}", timeout=_WAIT, isolation_level=None, check_same_thread=False, uri=True
        )
    records.create_function("casefold", 1, str.casefold, deterministic=True)
    if writable:
        end = time.monotonic() + _WAIT
        while True:
            try:
                records.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:  # others who begin it too; SQLite does not wait for this
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)
        records.execute("PRAGMA synchronous = FULL")  # what is acknowledged outlives a power cut as well
    return records


def _fuse(*rankings: Sequence[int]) -> dict[int, float]:
    """Reciprocal rank fusion."""
    fused: dict[int, float] = {}
    for ranking in rankings:
        for rank, seq in enumerate(ranking, 1):
            fused[seq] = fused.get(seq, 0.0) + 1 / (_RANK + rank)
    return fused


def _spread(
    order: Sequence[int],
    relevance: Mapping[int, float],
    vectors: Mapping[int, NDArray[np.float32]],
    k: int,
    diversity: float,
) -> list[int]:
    """Maximal marginal relevance: one after another, what is relevant and unlike those before."""
    left = list(order)
    chosen: list[int] = []
    nearest = dict.fromkeys(left, 0.0)
    while left and len(chosen) < k:
        best = max(left, key=lambda seq: (1 - diversity) * relevance[seq] - diversity * nearest[seq])
        chosen.append(best)
        left.remove(best)
        for seq in left:
            nearest[seq] = max(nearest[seq], float(vectors[seq] @ vectors[best]))
    return chosen
