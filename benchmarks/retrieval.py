"""The index beside hnswlib, usearch, faiss and exact search; its cross-over, and what it costs as it grows.

    python -m benchmarks.retrieval peers [--texts FILE.jsonl] [--plot FILE.png] [--json FILE]
    python -m benchmarks.retrieval real --texts FILE.jsonl
    python -m benchmarks.retrieval crossover
    python -m benchmarks.retrieval curves [--plot FILE.png]

Vectors are made of real ones: the default encoder's, of the tasks in models/*/data (or of --texts). A made-up vector is
a real one moved by 0.7 of the difference between another and one of its ten nearest, so that directions, spread and
neighbourhoods are those of real embeddings. Queries are made likewise and are not in the index. Recall is of the ten
nearest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from edge import Encoder, Index
from edge.device import detect

ROOT = Path(__file__).resolve().parents[1]
QUERIES = 1000
K = 10
EFFORTS = (50, 100, 200, 400, 800, 1600, 3200)

# Opens an index in a process of its own: seconds, and bytes of memory that it takes before the first search.
_OPEN = """
import resource, sys, time
import numpy as np
kind, path, dim = sys.argv[1], sys.argv[2], int(sys.argv[3])
if kind == "ruvltra":
    import annoy; from edge import Index; import edge.index
elif kind == "hnswlib": import hnswlib
elif kind == "usearch": import usearch.index
elif kind == "faiss": import faiss
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, start = rss(), time.perf_counter()
if kind == "ruvltra": index = Index.open(path)
elif kind == "hnswlib":
    index = hnswlib.Index("ip", dim); index.load_index(path)
elif kind == "usearch": index = usearch.index.Index.restore(path, view=True)
elif kind == "faiss": index = faiss.read_index(path)
else: index = np.load(path, mmap_mode="r")
print(time.perf_counter() - start, rss() - before)
"""


class Peer(NamedTuple):
    """One way to search, built.

    Attributes:
        kind: Whose.
        seconds: To build it, on two threads.
        search: Rows of the k nearest of one vector, at an effort.
        save: Writes it to a path.
        efforts: Its efforts, ascending.
    """

    kind: str
    seconds: float
    search: Callable[[Any, int], Any]
    save: Callable[[Path], object]
    efforts: tuple[int, ...]


def real(texts: Path | None) -> tuple[Any, str]:
    """Unit vectors of tasks, each text once; and what they are of."""
    files = [texts] if texts else sorted((ROOT / "models").glob("*/data/*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    unique = list(dict.fromkeys(row.get("task") or row["text"] for row in rows if row.get("task") or row.get("text")))
    encoder = Encoder.load()
    blocks = [unique[start : start + 256] for start in range(0, len(unique), 256)]
    vectors = np.concatenate([encoder.encode(block) for block in tqdm(blocks, desc="embedding", unit="block")])
    return vectors, f"{len(unique)} texts of {texts.name if texts else 'models/*/data'}"


def made_up(vectors: Any, count: int, seed: int = 0) -> Any:
    """(count, dim) float32 unit vectors, clustered as the real ones are; see the head of this file."""
    random = np.random.default_rng(seed)
    near = np.empty((len(vectors), 10), dtype=np.int64)
    for start in range(0, len(vectors), 2000):
        cosines = vectors[start : start + 2000] @ vectors.T
        cosines[np.arange(len(cosines)), np.arange(start, start + len(cosines))] = -2
        near[start : start + 2000] = np.argpartition(-cosines, 10, axis=1)[:, :10]
    rows = np.empty((count, vectors.shape[1]), dtype=np.float32)
    for start in range(0, count, 100_000):
        size = min(100_000, count - start)
        centre, one = random.integers(len(vectors), size=(2, size))
        other = near[one, random.integers(10, size=size)]
        moved = vectors[centre] + 0.7 * (vectors[one] - vectors[other])
        rows[start : start + size] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    return rows


def fewer(vectors: Any, dim: int) -> Any:
    """The same in the directions of the largest variance, of unit length again."""
    directions = np.linalg.eigh(np.cov(vectors.T.astype(np.float64)))[1][:, : -dim - 1 : -1]
    rows = vectors @ directions.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def truth(base: Any, queries: Any) -> list[set[int]]:
    found = []
    for start in range(0, len(queries), 50):
        cosines = queries[start : start + 50] @ base.T
        found += [set(row) for row in np.argpartition(-cosines, K, axis=1)[:, :K].tolist()]
    return found


def build_ours(base: Any, **options: Any) -> Peer:
    names = [str(row) for row in range(len(base))]
    start = time.perf_counter()
    index = Index.build(names, base, backend="annoy", **options)
    seconds = time.perf_counter() - start
    return Peer("ruvltra", seconds, lambda q, effort: index.nearest(q, K, effort=effort)[0][0], index.save, EFFORTS)


def build_hnswlib(base: Any) -> Peer:
    import hnswlib

    index = hnswlib.Index("ip", base.shape[1])
    index.init_index(len(base), M=16, ef_construction=200)
    index.set_num_threads(2)
    start = time.perf_counter()
    index.add_items(base)
    seconds = time.perf_counter() - start
    index.set_num_threads(1)

    def search(query: Any, effort: int) -> Any:
        index.set_ef(effort)
        return index.knn_query(query, K)[0][0]

    return Peer("hnswlib", seconds, search, lambda path: index.save_index(str(path)), (10, 20, 40, 80, 160, 320))


def build_usearch(base: Any) -> Peer:
    from usearch.index import Index as USearch

    index = USearch(ndim=base.shape[1], metric="ip", dtype="f32", connectivity=16, expansion_add=200)
    start = time.perf_counter()
    index.add(np.arange(len(base)), base, threads=2)
    seconds = time.perf_counter() - start

    def search(query: Any, effort: int) -> Any:
        index.expansion_search = effort
        return index.search(query, K, threads=1).keys.astype(np.int64)

    return Peer("usearch", seconds, search, lambda path: index.save(str(path)), (10, 20, 40, 80, 160, 320))


def build_faiss(base: Any) -> Peer:
    import faiss

    faiss.omp_set_num_threads(2)
    index = faiss.IndexHNSWFlat(base.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200
    start = time.perf_counter()
    index.add(base)
    seconds = time.perf_counter() - start
    faiss.omp_set_num_threads(1)

    def search(query: Any, effort: int) -> Any:
        index.hnsw.efSearch = effort
        return index.search(query[None], K)[1][0]

    return Peer(
        "faiss HNSW", seconds, search, lambda path: faiss.write_index(index, str(path)), (10, 20, 40, 80, 160, 320)
    )


def exact(base: Any, query: Any) -> Any:
    cosines = base @ query
    best = np.argpartition(cosines, len(base) - K)[len(base) - K :]
    return best[np.argsort(-cosines[best])]


def timed(search: Callable[[Any], Any], queries: Any) -> tuple[list[float], list[Any]]:
    """Seconds of each query, and its answer."""
    seconds, answers = [], []
    for query in queries:
        start = time.perf_counter()
        answer = search(query)
        seconds.append(time.perf_counter() - start)
        answers.append(answer)
    return seconds, answers


def recall(answers: list[Any], true: list[set[int]]) -> float:
    return sum(len(set(np.asarray(a).tolist()) & t) for a, t in zip(answers, true, strict=True)) / (K * len(true))


def two_threads(search: Callable[[Any], Any], queries: Any) -> float:
    """Queries a second on two threads."""
    half = len(queries) // 2
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: [search(query) for query in part], (queries[:half], queries[half:])))
    return len(queries) / (time.perf_counter() - start)


def at_recall(points: list[dict[str, float]], wanted: float, key: str) -> float | None:
    """A figure at a recall, between the two measured on either side of it."""
    points = sorted(points, key=lambda point: point["recall"])
    for low, high in pairwise(points):
        if low["recall"] <= wanted <= high["recall"]:
            share = (wanted - low["recall"]) / max(high["recall"] - low["recall"], 1e-9)
            return low[key] + share * (high[key] - low[key])
    return points[0][key] if points[0]["recall"] > wanted else None


def compare(base: Any, queries: Any, builders: dict[str, Callable[[Any], Peer]]) -> dict[str, Any]:
    """All peers on the same vectors, their queries alternated, one thread each."""
    true = truth(base, queries)
    report: dict[str, Any] = {}
    peers = []
    with tempfile.TemporaryDirectory() as folder:
        for name, build in builders.items():
            peer = build(base)
            path = Path(folder) / name.replace(" ", "-")
            peer.save(path)
            size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
            command = [sys.executable, "-c", _OPEN, peer.kind.split()[0], str(path), str(base.shape[1])]
            opened = [subprocess.check_output(command, cwd=ROOT, text=True).split() for _ in range(5)]
            report[name] = {
                "build_seconds": peer.seconds,
                "bytes": size,
                "open_ms": float(np.median([float(row[0]) for row in opened])) * 1e3,
                "open_rss": int(np.median([int(row[1]) for row in opened])),
                "points": [],
            }
            peers.append((name, peer))
            print(f"{name}: built in {peer.seconds:.1f} s, {size / 1e6:.0f} MB", file=sys.stderr)
    exact_seconds = timed(lambda query: exact(base, query), queries[:200])[0]
    rounds = max(len(peer.efforts) for _, peer in peers)
    for place in range(rounds):  # one effort of each in turn, so that what disturbs one disturbs all
        for name, peer in peers:
            if place < len(peer.efforts):
                effort = peer.efforts[place]
                timed(lambda query, s=peer.search, e=effort: s(query, e), queries[:50])  # warm
                seconds, answers = timed(lambda query, s=peer.search, e=effort: s(query, e), queries)
                report[name]["points"].append(
                    {
                        "effort": effort,
                        "recall": recall(answers, true),
                        "p50_ms": float(np.median(seconds)) * 1e3,
                        "p95_ms": float(np.percentile(seconds, 95)) * 1e3,
                        "qps_two_threads": two_threads(lambda query, s=peer.search, e=effort: s(query, e), queries),
                    }
                )
    exact_seconds += timed(lambda query: exact(base, query), queries[:200])[0]
    report["exact numpy"] = {"p50_ms": float(np.median(exact_seconds)) * 1e3, "bytes": base.nbytes}
    return report


def table(report: dict[str, Any], wanted: float) -> str:
    """Markdown."""
    ours = at_recall(report["ruvltra"]["points"], wanted, "p50_ms")
    whole = report["exact numpy"]["p50_ms"]
    rows = [
        f"| | build, s | MB | open, ms | memory of opening, MB | p50 at recall {wanted}, ms | ours / its | "
        "QPS on two threads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, facts in report.items():
        if name == "exact numpy":
            rows.append(
                f"| {name} | | {facts['bytes'] / 1e6:.0f} | | | {whole:.2f} (recall 1) | {ours / whole:.3f} | |"
            )
            continue
        p50, qps = (at_recall(facts["points"], wanted, key) for key in ("p50_ms", "qps_two_threads"))
        cells = "not reached | | |" if p50 is None else f"{p50:.3f} | {ours / p50:.2f} | {qps:.0f} |"
        rows.append(
            f"| {name} | {facts['build_seconds']:.1f} | {facts['bytes'] / 1e6:.0f} | {facts['open_ms']:.1f} | "
            f"{facts['open_rss'] / 1e6:.1f} | {cells}"
        )
    return "\n".join(rows)


def plot(report: dict[str, Any], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot()
    for name, facts in report.items():
        if "points" in facts:
            points = sorted(facts["points"], key=lambda point: point["recall"])
            axis.plot([p["recall"] for p in points], [1e3 / p["p50_ms"] for p in points], marker="o", label=name)
    axis.axhline(1e3 / report["exact numpy"]["p50_ms"], color="grey", linestyle="--", label="exact numpy")
    axis.set(xlabel="recall of the ten nearest", ylabel="queries a second, one thread", title=title, yscale="log")
    axis.set_xlim(0.5, 1.005)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def crossover(vectors: Any) -> list[dict[str, float]]:
    """Exact search and Annoy, by the number of vectors; the index's own, effort as tuned for a recall of 0.95."""
    rows = []
    for count in (500, 1000, 2000, 3000, 5000, 7000, 10_000, 20_000, 50_000):
        every = made_up(vectors, count + 300)
        base, queries = every[:count], every[count:]
        names = [str(row) for row in range(count)]
        annoy, whole = Index.build(names, base, backend="annoy"), Index.build(names, base, backend="exact")
        effort = None if annoy.tuning is None else annoy.tuning.effort
        best = []
        for index in (whole, annoy, whole, annoy):
            seconds = timed(lambda query, index=index: index.nearest(query, K), queries)[0]
            best.append(float(np.median(seconds)) * 1e3)
        rows.append({"vectors": count, "exact_ms": min(best[::2]), "annoy_ms": min(best[1::2]), "effort": effort or 0})
    return rows


def curves(vectors: Any, dim: int = 128) -> list[dict[str, Any]]:
    """What an index costs as it grows."""
    rows = []
    small = fewer(vectors, dim)
    for count in (10_000, 100_000, 1_000_000):
        code = (
            "import json, resource, sys; import numpy as np; from benchmarks.retrieval import one_size\n"
            "print(json.dumps(one_size(np.load(sys.argv[1]), int(sys.argv[2]))))"
        )
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "real.npy", small)
            command = [sys.executable, "-c", code, str(Path(folder) / "real.npy"), str(count)]
            rows.append(json.loads(subprocess.check_output(command, cwd=ROOT, text=True)))
        print(rows[-1], file=sys.stderr)
    return rows


def one_size(vectors: Any, count: int) -> dict[str, Any]:
    import resource

    every = made_up(vectors, count + 300)
    base, queries = every[:count].copy(), every[count:].copy()
    del every
    true = truth(base, queries)
    peer = build_ours(base)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        peer.save(Path(folder) / "index")
        index = Index.open(Path(folder) / "index")
        size = sum(file.stat().st_size for file in (Path(folder) / "index").iterdir())
        exact_seconds = timed(lambda query: exact(base, query), queries[:100])[0]
        timed(lambda query: index.nearest(query, K), queries)
        seconds, answers = timed(lambda query: index.nearest(query, K)[0][0], queries)
    return {
        "vectors": count,
        "dim": vectors.shape[1],
        "build_seconds": peer.seconds,
        "peak_bytes": peak,
        "bytes": size,
        "bytes_vectors": base.nbytes,
        "effort": None if index.tuning is None else index.tuning.effort,
        "recall": recall(answers, true),
        "recall_tuned": None if index.tuning is None else index.tuning.recall,
        "p50_ms": float(np.median(seconds)) * 1e3,
        "exact_p50_ms": float(np.median(exact_seconds)) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("peers", "real", "crossover", "curves"))
    parser.add_argument("--texts", type=Path, help="JSON lines with 'task' or 'text', instead of models/*/data")
    parser.add_argument("--count", type=int, default=100_000, help="vectors, for peers (default: 100000)")
    parser.add_argument("--recall", type=float, default=0.97, help="at which peers are compared (default: 0.97)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    vectors, what = real(options.texts)
    device = detect()
    machine = f"{device.cpu}, {device.physical_cores} cores, {platform.system()} {platform.machine()}"
    result: dict[str, Any] = {"of": what, "machine": machine, "threads": os.environ.get("OMP_NUM_THREADS", "all")}
    builders: dict[str, Callable[[Any], Peer]] = {
        "ruvltra": build_ours,
        "hnswlib": build_hnswlib,
        "usearch": build_usearch,
        "faiss HNSW": build_faiss,
    }
    if options.question in ("peers", "real"):
        if options.question == "peers":
            every = made_up(vectors, options.count + QUERIES)
        else:
            every = vectors[np.random.default_rng(0).permutation(len(vectors))]
        base, queries = np.ascontiguousarray(every[:-QUERIES]), every[-QUERIES:]
        nearest = np.array([max(base @ query) for query in queries[:200]])
        result["nearest_cosine"] = float(np.median(nearest))
        result["peers"] = compare(base, queries, builders)
        result["vectors"] = len(base)
        print(f"{len(base)} x {base.shape[1]}, of {what}; cosine of the nearest: {np.median(nearest):.2f}; {machine}\n")
        print(table(result["peers"], options.recall))
        if options.plot:
            plot(result["peers"], f"{len(base)} vectors of {base.shape[1]} values", options.plot)
    elif options.question == "crossover":
        result["crossover"] = crossover(vectors)
        print("| vectors | exact, ms | Annoy, ms | effort |\n|---|---|---|---|")
        for row in result["crossover"]:
            print(f"| {row['vectors']} | {row['exact_ms']:.3f} | {row['annoy_ms']:.3f} | {row['effort'] or 'exact'} |")
    else:
        result["curves"] = curves(vectors)
        print("| vectors | build, s | peak, GB | MB | of them vectors | effort | recall | p50, ms | exact p50, ms |")
        print("|---|---|---|---|---|---|---|---|---|")
        for row in result["curves"]:
            print(
                f"| {row['vectors']} | {row['build_seconds']:.1f} | {row['peak_bytes'] / 1e9:.2f} "
                f"| {row['bytes'] / 1e6:.0f} | {row['bytes_vectors'] / 1e6:.0f} | {row['effort']} "
                f"| {row['recall']:.3f} | {row['p50_ms']:.3f} | {row['exact_p50_ms']:.2f} |"
            )
        if options.plot:
            plot_curves(result["curves"], options.plot)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    counts = [row["vectors"] for row in rows]
    kinds = (("build_seconds", "build, s", 1.0), ("bytes", "index, MB", 1e-6), ("p50_ms", "one search, ms", 1.0))
    for axis, (key, label, scale) in zip(figure.subplots(1, 3), kinds, strict=True):
        axis.plot(counts, [row[key] * scale for row in rows], marker="o", label="index")
        if key == "p50_ms":
            axis.plot(counts, [row["exact_p50_ms"] for row in rows], marker="o", linestyle="--", label="exact numpy")
        if key == "bytes":
            axis.plot(counts, [row["bytes_vectors"] / 1e6 for row in rows], marker="o", linestyle="--", label="vectors")
        axis.set(xlabel=f"vectors of {rows[0]['dim']} values", ylabel=label, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
