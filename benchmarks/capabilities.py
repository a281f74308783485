"""How often `ruvltra capabilities` finds what a request asks for, and how soon.

    python -m benchmarks.capabilities [FILE.jsonl] [--bundle DIR] [--catalogue FILE.jsonl] [--errors] [--json OUT]

FILE has rows {"id", "request"}; by default those of models/capabilities/test.jsonl, one for each of the 556 entries
that differ, written by somebody who saw their names, keywords and categories and nothing else of the catalogue. An id
is found if it is the hit or one of its `also`. Beside it, on the same requests: BM25 over the entries' names and
keywords alone, and the cosine of the request and the entry's description, as a vector store would have it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from edge.bundle import Bundle
from edge.capabilities import Capabilities, Scorer
from edge.encoder import Encoder
from edge.index import Index
from export.capabilities import Found, postings, read_catalogue

DATA = Path(__file__).resolve().parent.parent / "models" / "capabilities"


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=DATA / "test.jsonl", metavar="FILE.jsonl")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--catalogue", type=Path, default=DATA / "catalogue.jsonl", metavar="FILE.jsonl")
    parser.add_argument("--errors", action="store_true", help="print each request that is not answered first")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()

    rows = [json.loads(line) for line in options.file.read_text(encoding="utf-8").splitlines()]
    bundle = Bundle.open(options.bundle)
    encoder = Encoder.load(bundle)
    catalogue = Capabilities.load(bundle, encoder=encoder)
    place = {name: i for i, entry in enumerate(catalogue.entries) for name in entry.ids}
    label = np.array([place[row["id"]] for row in rows])
    requests = [row["request"] for row in rows]

    count = len(catalogue.entries)
    ours = np.zeros((len(rows), count))
    times = []
    for i, row in enumerate(rows):
        started = time.perf_counter()
        hits = catalogue.search(row["request"], count)
        times.append(time.perf_counter() - started)
        for hit in hits:
            ours[i, place[hit.id]] = hit.score
        if options.errors and row["id"] not in (hits[0].id, *hits[0].also):
            print(f"{row['id']} -> {hits[0].id}: {row['request']}", file=sys.stderr)

    described = {name: entry for entry in read_catalogue(options.catalogue) for name in entry.ids}
    entries = [described[entry.ids[0]] for entry in catalogue.entries]
    plain = [entry._replace(description=entry.title, requests=()) for entry in entries]
    nothing = np.zeros((count, bundle.encoder.dim), dtype=np.float32)
    words = Scorer(nothing, nothing[:, 0], *postings(plain))
    vectors = encoder.encode(requests)
    found = {
        "names and keywords, BM25": np.stack([words.logits(text, nothing[0]) for text in requests]),
        "descriptions, cosine": np.zeros((len(rows), count)),
        "ruvltra capabilities": ours,
    }
    index = Index.build(
        [str(i) for i in range(count)], encoder.encode([entry.description for entry in entries]), backend="exact"
    )
    near, cosines = index.nearest(vectors, count)
    np.put_along_axis(found["descriptions, cosine"], near, cosines.astype(np.float64), axis=1)

    scores = {name: Found.of(logits, label) for name, logits in found.items()}
    probability = ours.max(axis=1)
    right = ours.argmax(axis=1) == label
    print(
        f"{options.file.name}: {len(rows)} requests, {count} entries of {len(catalogue)} ids. 95 % Wilson intervals.\n"
    )
    print("| | first | within five |\n|---|---|---|")
    for name, score in scores.items():
        print(f"| {name} | {score.first} | {score.first_five} |")
    p50, p95 = statistics.median(times), statistics.quantiles(times, n=20)[-1]
    print(f"\na search takes {p50 * 1e3:.2f} ms (median; 95 %: {p95 * 1e3:.2f} ms), embedding included")
    print(f"its score says {probability.mean():.1%} on average, and {right.mean():.1%} are right")
    if options.json:
        result = {
            name: {key: asdict(share) for key, share in score._asdict().items()} for name, score in scores.items()
        }
        options.json.write_text(json.dumps({"scores": result, "p50_ms": p50 * 1e3, "p95_ms": p95 * 1e3}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
