"""How often `ruvltra capabilities` finds what a request asks for, and how soon.

    python -m benchmarks.capabilities [FILE.jsonl ...] [--bundle DIR] [--catalogue FILE.jsonl] [--errors] [--json OUT]

A FILE has rows {"id", "request"}. By default those of models/capabilities: test.jsonl, a request for each of the 556
entries that differ, and test-long.jsonl, for 280 of them one as somebody in the midst of work would put it. Their
authors saw names, keywords and categories, and nothing else of the catalogue. An id is found if it is the hit or one
of its `also`. Beside it, on the same requests: BM25 over the entries' names and keywords alone, and the cosine of the
request and the entry's description, as a vector store would have it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle import Bundle
from edge.capabilities import Capabilities, Scorer
from edge.encoder import Encoder
from edge.index import Index
from export.capabilities import Described, Found, postings, read_catalogue

DATA = Path(__file__).resolve().parent.parent / "models" / "capabilities"


def by_words(entries: list[Described], requests: list[str]) -> NDArray[np.float32]:
    """(requests, entries) BM25 over names and keywords."""
    nothing = np.zeros((len(entries), 1), dtype=np.float32)
    plain = [entry._replace(description=entry.title, requests=()) for entry in entries]
    words = Scorer(nothing, nothing[:, 0], *postings(plain))
    return np.stack([words.logits(text, nothing[0]) for text in requests])


def by_description(encoder: Encoder, entries: list[Described], requests: list[str]) -> NDArray[np.float32]:
    """(requests, entries) cosines of request and description."""
    names = [str(i) for i in range(len(entries))]
    index = Index.build(names, encoder.encode([entry.description for entry in entries]), backend="exact")
    near, cosines = index.nearest(encoder.encode(requests), len(entries))
    found = np.zeros_like(cosines)
    np.put_along_axis(found, near, cosines, axis=1)
    return found


def measure(path: Path, catalogue: Capabilities, encoder: Encoder, entries: list[Described], errors: bool) -> Any:
    """Score one file; prints its table."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    place = {name: i for i, entry in enumerate(entries) for name in entry.ids}
    label = np.array([place[row["id"]] for row in rows])
    requests = [row["request"] for row in rows]
    ours = np.zeros((len(rows), len(entries)))
    times = []
    for i, row in enumerate(rows):
        started = time.perf_counter()
        hits = catalogue.search(row["request"], len(entries))
        times.append(time.perf_counter() - started)
        for hit in hits:
            ours[i, place[hit.id]] = hit.score
        if errors and place[hits[0].id] != label[i]:
            print(f"{row['id']} -> {hits[0].id}: {row['request']}", file=sys.stderr)
    scores = {
        "names and keywords, BM25": Found.of(by_words(entries, requests), label),
        "descriptions, cosine": Found.of(by_description(encoder, entries, requests), label),
        "ruvltra capabilities": Found.of(ours, label),
    }
    p50, p95 = statistics.median(times) * 1e3, statistics.quantiles(times, n=20)[-1] * 1e3
    confidence = float(ours.max(axis=1).mean())
    print(f"\n{path.name}: {len(rows)} requests\n\n| | first | within five |\n|---|---|---|")
    for name, score in scores.items():
        print(f"| {name} | {score.first} | {score.first_five} |")
    print(f"\na search, embedding included: median {p50:.2f} ms, 95 % within {p95:.2f} ms; the first hit's score is")
    print(f"{confidence:.1%} on average")
    shares = {name: {key: asdict(share) for key, share in score._asdict().items()} for name, score in scores.items()}
    return {"file": path.name, "scores": shares, "p50_ms": p50, "p95_ms": p95, "confidence": confidence}


def main() -> int:
    """Measure, and print a table a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = [DATA / "test.jsonl", DATA / "test-long.jsonl"]
    parser.add_argument("files", type=Path, nargs="*", default=default, metavar="FILE.jsonl")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--catalogue", type=Path, default=DATA / "catalogue.jsonl", metavar="FILE.jsonl")
    parser.add_argument("--errors", action="store_true", help="print each request that is not answered first")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()

    bundle = Bundle.open(options.bundle)
    encoder = Encoder.load(bundle)
    catalogue = Capabilities.load(bundle, encoder=encoder)
    described = {entry.ids[0]: entry for entry in read_catalogue(options.catalogue)}
    entries = [described[entry.ids[0]] for entry in catalogue.entries]
    print(f"{len(entries)} entries of {len(catalogue)} ids; 95 % Wilson intervals")
    results = [measure(path, catalogue, encoder, entries, options.errors) for path in options.files]
    if options.json:
        options.json.write_text(json.dumps(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
