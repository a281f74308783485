"""The verbs ``ruvltra memory`` and ``ruvltra index``: what they take, and what they do."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edge.cli_options import count, texts
from edge.encoder import Encoder
from edge.errors import InputError
from edge.index import BACKENDS, RECALL, Index, check_recall
from edge.memory import MODES, NAMESPACE, Match, MemoryStore, Record
from edge.notes import is_markdown, json_lines, lines, notes, read, within
from edge.trees import TREES

T = TypeVar("T")
_BATCH = 256  # records of a transaction


def fill_memory(parser: argparse.ArgumentParser) -> None:
    """Give ``ruvltra memory`` its verbs."""
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument("folder", type=Path, metavar="DIR", help="folder of the store")
    store.add_argument("--bundle", metavar="DIR", help="whose encoder embeds (default: the one that is built in)")
    space = argparse.ArgumentParser(add_help=False)
    space.add_argument(
        "--namespace", default=NAMESPACE, metavar="NAME", help=f"part of the store (default: {NAMESPACE})"
    )
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="write JSON, one object a line")

    add = verbs.add_parser(
        "add", parents=[store, space, as_json], help="remember texts", description="Remember texts; prints their ids."
    )
    add.add_argument("--id", metavar="ID", help="name of a single text (default: a hash of it)")
    add.add_argument("--metadata", type=_metadata, metavar="JSON", help="what searches can be limited by, an object")
    add.add_argument("--ttl", type=float, metavar="SECONDS", help="forget it after so long")
    add.add_argument("--replace", action="store_true", help="put it in the place of another text of this id")
    add.add_argument("text", nargs="+", metavar="TEXT", help="a text; '-' reads texts from standard input, one a line")
    add.set_defaults(run=_add)

    bring = verbs.add_parser(
        "import",
        parents=[store, as_json],
        help="remember what is in files",
        description="Remember Markdown notes (a file or a folder: a record a passage), JSON lines, or texts, one a "
        "line. Importing notes again replaces the passages that have changed and removes those that are gone.",
    )
    bring.add_argument(
        "--format", choices=("auto", "jsonl", "lines"), default="auto", help="of standard input and files"
    )
    bring.add_argument("--namespace", metavar="NAME", help="part of the store (default: the row's own, or default)")
    bring.add_argument("--replace", action="store_true", help="replace other texts of the same ids")
    bring.add_argument("sources", nargs="+", metavar="SOURCE", help="a file or folder; '-' is standard input")
    bring.set_defaults(run=_import)

    get = verbs.add_parser("get", parents=[store, space], help="print a record, as JSON")
    get.add_argument("id", metavar="ID")
    get.set_defaults(run=_get)

    search = verbs.add_parser(
        "search",
        parents=[store, as_json],
        help="find records",
        description="Find the records that fit a text best, by meaning, by words, or by both.",
    )
    search.add_argument("--namespace", default=NAMESPACE, metavar="NAME", help="part of the store; '*' is all of it")
    search.add_argument("-k", type=count, default=10, metavar="N", help="how many (default: 10)")
    search.add_argument("--mode", choices=MODES, default="hybrid", help="how (default: hybrid)")
    search.add_argument(
        "--where",
        type=_where,
        action="append",
        default=[],
        metavar="CONDITION",
        help="on metadata: KEY=VALUE, KEY>=N, KEY<=N, KEY>N, KEY<N, KEY~TEXT (contains), KEY=null (missing); several "
        "must all hold, several of KEY=VALUE for one key are alternatives",
    )
    search.add_argument("--min-score", type=float, metavar="S", help="leave out what scores less")
    search.add_argument("--diversity", type=float, default=0.0, metavar="D", help="0 to 1: avoid what is alike")
    search.add_argument("text", nargs="+", metavar="TEXT", help="what to look for; '-' reads texts from standard input")
    search.set_defaults(run=_search)

    delete = verbs.add_parser("delete", parents=[store, space], help="forget records, by id or by metadata")
    delete.add_argument("--where", type=_where, action="append", default=[], metavar="CONDITION", help="as for search")
    delete.add_argument("ids", nargs="*", metavar="ID")
    delete.set_defaults(run=_delete)

    compact = verbs.add_parser("compact", parents=[store], help="build the index of all records anew")
    compact.set_defaults(run=_compact)

    stats = verbs.add_parser("stats", parents=[store, as_json], help="say how much there is of what")
    stats.set_defaults(run=_stats)

    export = verbs.add_parser(
        "export",
        parents=[store],
        help="print all records, as JSON lines",
        description="Print all records; import reads them.",
    )
    export.add_argument("--namespace", metavar="NAME", help="part of the store (default: all)")
    export.add_argument("--vectors", action="store_true", help="with their vectors, so that importing need not embed")
    export.set_defaults(run=_export)


def fill_index(parser: argparse.ArgumentParser) -> None:
    """Give ``ruvltra index`` its verbs."""
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("folder", type=Path, metavar="DIR", help="folder of the index")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="write JSON")
    bundle = argparse.ArgumentParser(add_help=False)
    bundle.add_argument("--bundle", metavar="DIR", help="whose encoder embeds (default: the one that is built in)")

    build = verbs.add_parser(
        "build",
        parents=[folder, bundle, as_json],
        help="build an index",
        description="Build an index of vectors (.npy), of JSON lines with id and text or vector, or of texts, one a "
        "line, which then are their own ids.",
    )
    build.add_argument("source", metavar="SOURCE", help=".npy, .jsonl or a file of texts; '-' reads texts")
    build.add_argument(
        "--ids", type=Path, metavar="FILE", help="ids of the rows of an .npy, one a line (default: 0, 1, ...)"
    )
    build.add_argument("--backend", choices=BACKENDS, default="auto", help="default: auto, by the number of vectors")
    build.add_argument("--trees", type=count, default=TREES, metavar="N", help=f"of Annoy (default: {TREES})")
    build.add_argument("--seed", type=int, default=0, metavar="N", help="of Annoy's choices (default: 0)")
    build.add_argument("--recall", type=float, default=RECALL, metavar="R", help=f"to tune for (default: {RECALL})")
    build.set_defaults(run=_index_build)

    search = verbs.add_parser("search", parents=[folder, bundle, as_json], help="find the nearest of a text or vector")
    search.add_argument("-k", type=count, default=10, metavar="N", help="how many (default: 10)")
    search.add_argument("--effort", type=count, metavar="N", help="candidates that Annoy looks at (default: as tuned)")
    search.add_argument(
        "text",
        nargs="+",
        metavar="TEXT",
        help="a text; '-' reads texts from standard input, one a line; FILE.npy has vectors to look for, a row each",
    )
    search.set_defaults(run=_index_search)

    inspect = verbs.add_parser("inspect", parents=[folder, as_json], help="check an index, and say what it is")
    inspect.set_defaults(run=_index_inspect)


def _add(options: argparse.Namespace) -> int:
    named = len(options.text) == 1 and options.text != ["-"]
    if options.id is not None and not named:
        raise InputError("--id names a single text. Give one text, or leave --id out.")
    with _open(options) as store:
        for batch in _batches(texts(options.text)):
            records = [
                {
                    "text": text,
                    "id": options.id,
                    "metadata": options.metadata,
                    "namespace": options.namespace,
                    "ttl": options.ttl,
                }
                for text in batch
                if text.strip() or named
            ]
            for name in store.add_many(records, replace=options.replace):
                print(json.dumps({"id": name}) if options.json else name, flush=True)
    return 0


def _import(options: argparse.Namespace) -> int:
    done = same = removed = 0
    shown = sys.stderr.isatty()
    began = time.monotonic()

    def tell() -> None:
        if shown:
            rate = (done + same) / (time.monotonic() - began)
            print(f"\r\033[K{done + same} records, {rate:.0f} a second", end="", file=sys.stderr, flush=True)

    for source in options.sources:
        if source != "-" and not os.path.exists(source):  # noqa: PTH110 (never raises); before anything is written
            raise InputError(f"{source}: no such file or folder. Check the path.")
    with _open(options) as store:
        try:
            for source in options.sources:
                if source != "-" and options.format == "auto" and is_markdown(Path(source)):
                    space = options.namespace or NAMESPACE
                    seen = set()
                    for note, passages in notes(Path(source)):
                        seen.add(note)
                        changed = [passage for passage in passages if not _is_there(store, passage, space)]
                        store.add_many([{"namespace": space} | passage for passage in changed], replace=True)
                        removed += _remove_passages(store, space, note, {passage["id"] for passage in passages})
                        done, same = done + len(changed), same + len(passages) - len(changed)
                        tell()
                    if Path(source).is_dir():
                        removed += _remove_notes(store, space, within(Path(source)), seen)
                    continue
                for batch in _batches(_source(source, options.format)):
                    records = [
                        record if options.namespace is None else record | {"namespace": options.namespace}
                        for _, record in batch
                    ]
                    try:
                        store.add_many(records, replace=options.replace)
                    except InputError as error:
                        first, last = batch[0][0], batch[-1][0]
                        raise InputError(
                            f"{str(error).rstrip('.')}. It is in the batch from {first} to {last}."
                        ) from None
                    done += len(batch)
                    tell()
        except (InputError, KeyboardInterrupt):
            if shown:
                print(file=sys.stderr)
            print(f"ruvltra: stopped; {done} records were imported before, and stay", file=sys.stderr)
            raise
        if shown:
            print(file=sys.stderr)
    if options.json:
        print(json.dumps({"imported": done, "unchanged": same, "removed": removed}))
    else:
        more = [f"{same} unchanged"] if same else []
        more += [f"{removed} that their notes no longer have removed"] if removed else []
        print(", ".join([f"{done} records imported", *more]))
    return 0


def _is_there(store: MemoryStore, passage: dict[str, Any], namespace: str) -> bool:
    record = store.get(passage["id"], namespace=namespace)
    return record is not None and (record.text, record.metadata) == (passage["text"], passage["metadata"])


def _remove_passages(store: MemoryStore, namespace: str, note: str, kept: set[str]) -> int:
    """Those of a note that it no longer has; what only names it as its source is somebody else's."""
    others = {record.id for record, _ in store.records(namespace=namespace, where={"source": note})}
    others = {name for name in others if not name.startswith(f"{note}#")}
    return store.delete_where({"source": note}, namespace=namespace, keep=kept | others)


def _remove_notes(store: MemoryStore, namespace: str, folder: str, seen: set[str]) -> int:
    """The passages of a folder's notes that are no more."""
    gone = {
        source
        for record, _ in store.records(namespace=namespace, where={"heading": {"gte": ""}})
        if isinstance(source := record.metadata.get("source"), str)
        and source.startswith(folder)
        and source not in seen
        and record.id.startswith(f"{source}#")
    }
    return sum(_remove_passages(store, namespace, source, set()) for source in gone)


def _source(source: str, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if source != "-" and kind == "auto":
        return read(Path(source))
    rows = texts([source]) if source == "-" else _lines(Path(source))
    where = "standard input" if source == "-" else source
    return json_lines(rows, where) if kind == "jsonl" else lines(rows, where)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            yield from (row.rstrip("\n") for row in stream)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder. Give a file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}). Check the file.") from None


def _get(options: argparse.Namespace) -> int:
    with _open(options, create=False) as store:
        record = store.get(options.id, namespace=options.namespace)
    if record is None:
        raise InputError(f"there is no record {options.id!r} in the namespace {options.namespace!r}. Look with: search")
    print(json.dumps(record._asdict(), ensure_ascii=False))
    return 0


def _search(options: argparse.Namespace) -> int:
    where = _conditions(options.where)
    with _open(options, create=False) as store:
        if options.mode != "text":
            _ = store.encoder  # loaded before the time is taken
        several = len(options.text) > 1 or options.text == ["-"]
        for text in texts(options.text):
            began = time.perf_counter()
            matches = store.search(
                text,
                options.k,
                mode=options.mode,
                where=where,
                namespace=None if options.namespace == "*" else options.namespace,
                min_score=options.min_score,
                diversity=options.diversity,
            )
            took = (time.perf_counter() - began) * 1e3
            if options.json:
                hits = [_match(match) for match in matches]
                print(json.dumps({"query": text, "hits": hits, "ms": round(took, 3)}, ensure_ascii=False), flush=True)
            else:
                if several:
                    print(f"> {text}")
                for match in matches:
                    said = " ".join(match.record.text.split())
                    place = f"{match.record.namespace}/" if options.namespace == "*" else ""
                    print(f"{match.score:.2f}  {place}{match.record.id:<12}  {said[:100]}", flush=True)
                if not matches:
                    print("nothing fits", file=sys.stdout if several else sys.stderr, flush=True)
    return 0


def _match(match: Match) -> dict[str, Any]:
    scores = {"score": match.score, "cosine": match.cosine, "words": match.words}
    return match.record._asdict() | {key: None if value is None else round(value, 6) for key, value in scores.items()}


def _delete(options: argparse.Namespace) -> int:
    if bool(options.ids) == bool(options.where):
        raise InputError("delete takes ids, or --where. Give one of the two.")
    with _open(options, create=False) as store:
        if options.where:
            print(f"{store.delete_where(_conditions(options.where), namespace=options.namespace)} records deleted")
            return 0
        missing = [name for name in options.ids if not store.delete(name, namespace=options.namespace)]
    if missing:
        which = f"{', '.join(map(repr, missing))} in the namespace {options.namespace!r}"
        if len(missing) < len(options.ids):
            raise InputError(f"there is no record {which}. The others are deleted.")
        raise InputError(f"there is no record {which}. Look with: search")
    return 0


def _compact(options: argparse.Namespace) -> int:
    with _open(options, create=False) as store:
        if not store.compact(_bar("neighbours")):
            raise InputError("another process is compacting this store. Wait for it.")
        print(_summary(store.stats()))
    return 0


def _stats(options: argparse.Namespace) -> int:
    with _open(options, create=False) as store:
        stats = store.stats()
    print(json.dumps(stats) if options.json else _summary(stats))
    return 0


def _summary(stats: dict[str, Any]) -> str:
    segment = stats["segment"]
    if segment is None:
        searched = "all exactly; no index, or none that can be used"
    else:
        how = "exactly"
        if segment["backend"] == "annoy":
            tuning = segment["tuning"]
            how = f"by {segment['trees']} trees of Annoy, recall {tuning['recall']:.3f} of the nearest {tuning['k']}"
        searched = f"{segment['count']} {how}"
        searched += f", {stats['since_compacted']} that came since then exactly" if stats["since_compacted"] else ""
    rows = [
        ("records", f"{stats['records']}" + (f", and {stats['expired']} expired" if stats["expired"] else "")),
        ("namespaces", ", ".join(f"{name}: {count}" for name, count in stats["namespaces"].items()) or "none"),
        ("vectors", "none yet" if stats["dim"] is None else f"{stats['dim']} values"),
        ("encoder", (stats["encoder"] or "not stated")[:12]),
        ("searched", searched),
        ("size", f"{stats['bytes'] / 1e6:.1f} MB"),
    ]
    return "\n".join(f"{name:<12}{value}" for name, value in rows)


def _export(options: argparse.Namespace) -> int:
    with _open(options, create=False) as store:
        now = time.time()
        made_by = store.stats()["encoder"]
        for record, vector in store.records(namespace=options.namespace):
            row = _exported(record, vector if options.vectors else None, now)
            if options.vectors and made_by is not None:
                row["encoder"] = made_by
            print(json.dumps(row, ensure_ascii=False))
    return 0


def _exported(record: Record, vector: Any, now: float) -> dict[str, Any]:
    """What import reads again; a time to live is what is left of it."""
    values: dict[str, Any] = {
        "id": record.id,
        "text": record.text,
        "metadata": record.metadata,
        "namespace": record.namespace,
    }
    values["created"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    if record.expires is not None:
        values["ttl"] = max(record.expires - now, 0.001)
    if vector is not None:
        values["vector"] = [float(f"{value:.9g}") for value in vector]
    return values


def _index_build(options: argparse.Namespace) -> int:
    check_recall(options.recall)
    encoder = None
    if options.source.endswith(".npy"):
        vectors = _array(Path(options.source))
        if options.ids is not None:
            names = list(_lines(options.ids))
        else:
            names = [str(row) for row in range(len(vectors) if vectors.ndim else 0)]
    else:
        if options.ids is not None:
            raise InputError("--ids names the rows of an .npy file. Leave it out, or put ids into the JSON lines.")
        kind = "jsonl" if options.source.endswith((".jsonl", ".ndjson")) else "lines"
        rows = [row for _, row in _source(options.source, kind)]
        names = [str(row.get("text", "") if row.get("id") is None else row["id"]) for row in rows]
        if rows and all("vector" in row for row in rows):
            vectors = [row["vector"] for row in rows]
        elif all(isinstance(row.get("text"), str) for row in rows):
            embedder = Encoder.load(options.bundle)
            encoder = embedder.id
            parts = [embedder.encode([row["text"] for row in batch]) for batch in _batches(rows)]
            vectors = np.concatenate(parts) if parts else np.empty((0, embedder.dim))
            if not options.source.endswith((".jsonl", ".ndjson")):
                kept = {name: place for place, name in reversed(list(enumerate(names)))}  # the same line is one text
                names, vectors = list(kept), vectors[list(kept.values())]
        else:
            raise InputError(
                f"{options.source}: not all rows have a vector, nor have all a text. Give all of them the same of both."
            )
    index = Index.build(
        names,
        vectors,
        backend=options.backend,
        trees=options.trees,
        seed=options.seed,
        encoder=encoder,
        progress=_bar("neighbours"),
    )
    if options.recall != RECALL and index.trees is not None and index.tune(options.recall).effort is None:
        print(f"ruvltra: no effort finds {options.recall:g} of the nearest; all are compared", file=sys.stderr)
    index.save(options.folder)
    return _describe(index, options)


def _index_search(options: argparse.Namespace) -> int:
    if len(options.text) == 1 and options.text[0].endswith(".npy"):
        index = Index.open(options.folder)
        rows = np.atleast_2d(_array(Path(options.text[0])))
        if rows.ndim != 2:
            raise InputError(f"{options.text[0]}: has shape {rows.shape}. Give a matrix of one vector a row.")
        queries: Iterator[tuple[Any, Any]] = enumerate(rows)
        several = len(rows) > 1
    else:
        encoder = Encoder.load(options.bundle)
        index = Index.open(options.folder, encoder=encoder.id)
        several = len(options.text) > 1 or options.text == ["-"]
        queries = ((text, encoder.encode([text])[0]) for text in texts(options.text))
    for name, vector in queries:
        began = time.perf_counter()
        hits = index.search(vector, options.k, effort=options.effort)
        took = (time.perf_counter() - began) * 1e3
        if options.json:
            found = [hit._asdict() for hit in hits]
            print(json.dumps({"query": name, "hits": found, "ms": round(took, 3)}, ensure_ascii=False), flush=True)
        else:
            if several:
                print(f"> {name}")
            for hit in hits:
                print(f"{hit.score:.4f}  {hit.id}", flush=True)
            if not hits:
                print("nothing in this index", file=sys.stdout if several else sys.stderr, flush=True)
    return 0


def _index_inspect(options: argparse.Namespace) -> int:
    return _describe(Index.open(options.folder), options)


def _describe(index: Index, options: argparse.Namespace) -> int:
    size = sum(path.stat().st_size for path in options.folder.iterdir() if path.is_file())
    facts = index.describe() | {"bytes": size}
    if options.json:
        print(json.dumps(facts))
        return 0
    print(f"vectors   {facts['count']} of {facts['dim']} values")
    print(f"encoder   {(facts['encoder'] or 'not stated')[:12]}")
    tuning = facts["tuning"]
    if facts["backend"] == "annoy":
        measured = (
            f"{tuning['recall']:.3f} of the nearest {tuning['k']} (asked: {tuning['target']}, n = {tuning['queries']})"
        )
        print(f"search    {facts['trees']} trees of Annoy, effort {tuning['effort']}: recall {measured}")
    else:
        print("search    exact")
    print(f"size      {size / 1e6:.1f} MB")
    return 0


def _open(options: argparse.Namespace, create: bool = True) -> MemoryStore:
    encoder = None if options.bundle is None else Encoder.load(options.bundle)
    return MemoryStore(options.folder, encoder=encoder, create=create)


def _array(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Check the path.") from None
    except (OSError, ValueError, EOFError):
        raise InputError(f"{path}: is no array of numbers as np.save writes it. Check the file.") from None


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _bar(what: str) -> Callable[[float], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(share: float) -> None:
        bar = "#" * round(20 * share)
        print(f"\r\033[K{what} [{bar:<20}]", end="\n" if share >= 1 else "", file=sys.stderr, flush=True)

    return show


def _metadata(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError('must be a JSON object, such as {"source": "wiki"}')
    return values


def _where(text: str) -> tuple[str, str, Any]:
    for sign in (">=", "<=", "=", ">", "<", "~"):
        key, found, value = text.partition(sign)
        key, value = key.strip(), value.strip()
        if found and key and value and not set(key) & set("<>=~!") and value[0] not in "<>=~":
            if sign == "~":
                return key, sign, value
            try:
                meant = json.loads(value)
            except (ValueError, RecursionError):
                return key, sign, value
            number = isinstance(meant, (int, float)) and not isinstance(meant, bool)
            return key, sign, [meant, value] if number and sign == "=" else meant  # 1.0 may be a version, a text
    raise argparse.ArgumentTypeError("must be KEY=VALUE, KEY>=N, KEY<=N, KEY>N, KEY<N or KEY~TEXT")


def _conditions(given: Sequence[tuple[str, str, Any]]) -> list[dict[str, Any]]:
    names = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt", "~": "contains"}
    alternatives: dict[str, list[Any]] = {}
    where: list[dict[str, Any]] = []
    for key, sign, value in given:
        if sign != "=":
            where.append({key: {names[sign]: value}})
            continue
        wanted = alternatives.setdefault(key, [])
        wanted += value if isinstance(value, list) else [value]
    return where + [{key: wanted} for key, wanted in alternatives.items()]
