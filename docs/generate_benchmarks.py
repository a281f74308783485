"""Writes docs/benchmarks.md, its plots, and README's figures from benchmarks/results; a test checks them.

python docs/generate_benchmarks.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import PEERS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FILLED = tuple(
    ROOT / name
    for name in ("README.md", *(f"docs/{page}.md" for page in ("performance", "playground", "claude-code", "serve")))
)  # pages with blocks of figures
OURS = "ruvltra-mini int8"
SAME_BACKBONE = [p.subject for p in PEERS.values() if p.bound is not None and p.environment != "ours"]
_BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.S)


class Result:
    """One result's rows, by case, subject and measure."""

    def __init__(self, question: str) -> None:
        self.document = json.loads((RESULTS / f"{question}.json").read_text(encoding="utf-8"))
        self.rows = {(row["case"], row["subject"], row["measure"]): row for row in self.document["rows"]}

    def subjects(self, case: str, measure: str) -> list[str]:
        return [subject for at, subject, of in self.rows if (at, of) == (case, measure)]

    def cases(self, measure: str) -> list[str]:
        return list(dict.fromkeys(case for case, _, of in self.rows if of == measure))

    def value(self, case: str, subject: str, measure: str) -> float:
        return float(self.rows[case, subject, measure]["value"])

    def head(self, command: str) -> str:
        found = self.document
        cpu, cores = found["machine"]["cpu"], found["machine"]["cores"]
        features = ", ".join(name for name in found["machine"]["instructions"] if name != "avx2")
        return (
            f"`{command}`, {found['date']}, {cpu} ({features}), {cores} cores, Python {found['machine']['python']}, "
            f"onnxruntime {found['versions']['onnxruntime']}."
        )


def number(value: float) -> str:
    """Three digits that count."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def share(row: dict[str, Any]) -> str:
    return f"{row['value']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def timed(row: dict[str, Any] | None) -> str:
    """A figure, and its ratio to the reference with quartiles."""
    if row is None:
        return "-"
    if "ratio" not in row:
        return number(row["value"])
    return f"{number(row['value'])} ({number(row['ratio'])} [{number(row['ratio_low'])}, {number(row['ratio_high'])}])"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def side_by_side(result: Result, cases: Sequence[str], measure: str, title: str = "") -> str:
    """A line a subject, a column a case; n is in the head."""
    subjects = result.subjects(cases[0], measure)
    counts = {result.rows[cases[0], subject, measure]["n"] for subject in subjects}
    lines = [[name, *(timed(result.rows.get((case, name, measure))) for case in cases)] for name in subjects]
    return table([f"{title or measure} (n = {', '.join(map(str, sorted(counts)))})", *cases], lines)


def best_peer(result: Result, case: str, measure: str, suffix: str = "", higher: bool = False) -> tuple[str, float]:
    """The best peer of the same backbone, and ours as a multiple of it, in the same rounds."""
    names = [name for name in SAME_BACKBONE if (case, name + suffix, measure) in result.rows]
    ratios = {name: float(result.rows[case, name + suffix, measure]["ratio"]) for name in names}
    best = (max if higher else min)(ratios, key=lambda name: ratios[name])
    return best, 1 / ratios[best]


def targets() -> str:
    """What was aimed at, and what came out."""
    latency, throughput, cold = Result("latency"), Result("throughput"), Result("cold")
    limit, curves = Result("limit"), Result("curves")
    found: list[tuple[str, float, float, bool]] = []  # what, figure, target, higher is better
    whole = "whole calls, 12 tokens, one thread"
    route = limit.rows[whole, "mini, route", "p50"]["ratio"]
    found.append(("route whole / its session, mini int8, 12 tokens", route, 1.25, False))
    products = limit.value("12 tokens, one thread", f"{OURS}, session to its products, integers to integers", "times")
    found.append(("mini int8's session / its products alone, 12 tokens", products, 2.0, False))
    for tokens in (4, 12, 48):
        name, ratio = best_peer(latency, f"{tokens} tokens, 1 thread", "p50", ", encode")
        found.append((f"encode, {tokens} tokens / best peer ({name})", ratio, 0.7, False))
    for threads in ("1 thread", "2 threads"):
        name, ratio = best_peer(throughput, threads, "rate", higher=True)
        found.append((f"throughput, {threads} / best peer ({name})", ratio, 1.5, True))
    for measure, case, aim in (
        ("wall", "one process, wall time", 0.5),
        ("peak", "one process, peak memory", 0.6),
    ):
        # Of all Python peers, other models included; and from start to a vector, which all of them give.
        names = {
            peer.subject: cold.value(case, f"{peer.subject}, first vector", measure)
            for peer in PEERS.values()
            if peer.environment not in ("ours", "ruvllm")
            and (case, f"{peer.subject}, first vector", measure) in cold.rows
        }
        if measure == "peak":
            names = {name: value for name, value in names.items() if name in SAME_BACKBONE}
        best = min(names, key=lambda name: names[name])
        ratio = cold.value(case, f"{OURS}, first vector", measure) / names[best]
        what = "cold start" if measure == "wall" else "peak memory of a cold start"
        found.append((f"{what} / best Python peer ({best})", ratio, aim, False))
    nano = latency.rows["12 tokens, 1 thread", "ruvltra-nano, route", "p50"]
    found.append(("nano, route whole, 12 tokens, ms", nano["value"], 0.3, False))
    static = latency.rows["12 tokens, 1 thread", "model2vec, distilled, encode", "p50"]
    found.append(("nano, route whole / model2vec's encode of equal size", nano["ratio"] / static["ratio"], 1.2, False))
    for name in ("mini", "nano"):
        grown = curves.rows["agents: 1000", f"{name} int8, route", "p50"]["ratio"]
        found.append((f"{name}, route among 1,000 agents / among 13", grown, 2.0, False))
    lines = []
    for what, figure, aim, higher in found:
        met = figure >= aim if higher else figure <= aim
        sign = "at least" if higher else "at most"
        lines.append([what, number(figure), f"{sign} {aim:g}", "yes" if met else "**no**"])
    return table(["", "measured", "aimed at", "met"], lines)


def notes(result: Result) -> str:
    found = result.document["notes"]
    return "\n".join(
        f"* {note}" for note in (found if isinstance(found, list) else [f"{k}: {v}" for k, v in found.items()])
    )


def absent(result: Result) -> str:
    """Which peers a result has no figures of, whether left out by --peers or for a reason that its notes give."""
    names = [peer.subject for peer in PEERS.values()]
    known = {subject for _, subject, _ in result.rows}
    answers = ("", ", encode", ", route", ", tier", ", first vector", ", first decision")
    gone = [name for name in names if not any(name + answer in known for answer in answers)]
    return f"No figures here of: {'; '.join(gone)}." if gone else ""


def speed_block() -> str:
    latency, cold = Result("latency"), Result("cold")
    case = "12 tokens, 1 thread"
    wanted = {
        f"**{OURS}**": (OURS, f"{OURS}, first decision"),
        "**ruvltra-nano**": ("ruvltra-nano", "ruvltra-nano, first decision"),
        **{
            name: (name, f"{name}, first vector")
            for name in ("fastembed, int8", "fastembed", "sentence-transformers, onnx", "sentence-transformers, torch")
        },
        "llama.cpp, Q8_0": ("llama.cpp Q8_0", "llama.cpp Q8_0, first vector"),
        "model2vec (another model, static)": ("model2vec, distilled", "model2vec, distilled, first vector"),
    }
    lines = []
    for shown, (name, start) in wanted.items():
        encode = latency.rows[case, f"{name}, encode", "p50"]
        route = latency.rows.get((case, f"{name}, route", "p50"))
        wall = cold.rows["one process, wall time", start, "wall"]
        peak = cold.rows["one process, peak memory", start, "peak"]
        lines.append(
            [
                shown,
                f"{number(encode['ratio'])} [{number(encode['ratio_low'])}, {number(encode['ratio_high'])}]",
                "-" if route is None else number(route["ratio"]),
                number(wall["ratio"]),
                number(peak["value"]),
            ]
        )
    one = latency.value(case, f"{OURS}, encode", "p50")
    head = ["", "a text of 12 tokens", "a decision", "whole process", "its memory, MB"]
    bare = cold.value("one process, wall time", "import of numpy, onnxruntime, tokenizers", "wall")
    rounds, machine = latency.rows[case, f"{OURS}, encode", "p50"]["n"], latency.document["machine"]["cpu"]
    return (
        f"{table(head, lines)}\n\nRatios: of the first two columns to {OURS} embedding the text ({number(one)} ms; one thread, "
        f"{rounds} rounds in turn, quartiles), of the third to a Python process that only imports numpy, onnxruntime and tokenizers "
        f"({number(1e3 * bare)} ms). {machine}, 2 cores; more peers, threads, the machine's limit, and where it falls short: "
        "[benchmarks](docs/benchmarks.md)."
    )


_SETS = {
    "test": "test split, seven tenths of it with another agent's vocabulary",
    "set plain": "blind, plain one-line tasks",
    "set hard": "blind, hard prompts, two thirds with another agent's vocabulary",
    "all sets": "blind, all, minimal pairs included",
    "blind-d": "blind-d alone, whose errors nobody has read",
    "commit-subjects-dev": "commit subjects of unseen repositories, noisy labels",
}


def accuracy_block() -> str:
    result = Result("accuracy")
    columns = {
        "keyword": "keyword",
        "keyword-first": f"{OURS}, keyword-first",
        "embedding": f"{OURS}, embedding",
        "**hybrid**": f"{OURS}, hybrid",
        "[nano](models/ruvltra-nano/CARD.md), hybrid": "ruvltra-nano int8, hybrid",
    }
    lines = []
    for case, what in _SETS.items():
        rows = [result.rows[case, subject, "accuracy"] for subject in columns.values()]
        lines.append([what, f"{rows[0]['n']:,}", *map(share, rows)])
    outside = result.rows["out-of-scope", f"{OURS}, hybrid", "out-of-scope abstained"]
    inside = result.rows["test", f"{OURS}, hybrid", "in-scope abstained"]
    return (
        f"{table(['', 'n', *columns], lines)}\n\nOf {outside['n']} out-of-scope prompts it abstains from {share(outside)}, "
        f"and from {share(inside)} of the test split's tasks in scope."
    )


def size_block() -> str:
    sizes = {
        name: sum(file.stat().st_size for file in (ROOT / "models" / name / "bundle").iterdir()) / 1e6
        for name in ("ruvltra-mini", "ruvltra-nano")
    }
    return (
        f"The default bundle, `ruvltra-mini`, has {sizes['ruvltra-mini']:.0f} MB; `ruvltra-nano` "
        f"({sizes['ruvltra-nano']:.1f} MB, in `models/ruvltra-nano/bundle`) is for devices where that or a millisecond is too much."
    )


def page() -> str:
    """docs/benchmarks.md."""
    latency, throughput, cold = Result("latency"), Result("throughput"), Result("cold")
    accuracy, curves, limit = Result("accuracy"), Result("curves"), Result("limit")
    routers = accuracy.subjects("test", "accuracy")
    cases = [case for case in (*_SETS, "out-of-scope") if case in accuracy.cases("accuracy")]
    right = [
        [
            name,
            *(share(accuracy.rows[case, name, "accuracy"]) for case in cases),
            share(accuracy.rows["out-of-scope", name, "out-of-scope abstained"]),
        ]
        for name in routers
    ]
    counts = [f"{case} (n = {accuracy.rows[case, routers[0], 'accuracy']['n']:,})" for case in cases]
    grown = []
    for case, subject, measure in curves.rows:
        row = curves.rows[case, subject, measure]
        grown.append([case, f"{subject}, {measure}", f"{number(row['value'])} {row['unit']}", number(row["ratio"])])
    limits = []
    for tokens in sorted({int(case.split()[0]) for case, _, of in limit.rows if of == "work"}):
        for name in (OURS, "ruvltra-mini fp32", "ruvltra-nano int8"):
            where = f"{tokens} tokens, one thread"
            session = limit.rows[where, f"{name}, session", "p50"]
            pairs = [
                limit.rows.get((where, f"{name}, session to {to}", "times"))
                for to in ("its products", "its products, integers to integers", "roofline")
            ]
            limits.append(
                [
                    f"{tokens}",
                    name,
                    number(limit.value(where, f"{name}, operations", "work")),
                    number(limit.value(where, f"{name}, weights", "work")),
                    number(session["value"]),
                    *("-" if row is None else number(row["value"]) for row in pairs),
                ]
            )
    return f"""# Benchmarks

Made by `python docs/generate_benchmarks.py` from `benchmarks/results/*.json`, which `python -m benchmarks QUESTION --json FILE`
writes. `python -m benchmarks --check OLD.json NEW.json` says what became worse, by ratio.

## Method

* Peers have environments of their own, made on demand with pinned versions (`benchmarks/peers/__init__.py`), and run from local files.
* Peers of the same backbone run ruvltra-mini's own checkpoint. Before anything is timed their vectors are held against our fp32 ones; a peer
  whose vectors differ is left out, and named below.
* All processes are loaded at the same time and asked in turn, each confined to the stated number of cores. A figure is the median over rounds;
  in brackets stand the ratio to {OURS} in the same round and its quartiles. Compare ratios; times are this machine's.
* Shares have 95 % Wilson intervals. Abstaining from a task in scope is wrong.
* One machine, of one kind: {latency.document["machine"]["cpu"]}, a virtual one with {latency.document["machine"]["cores"]} cores. On others the order may differ.

![Latency, throughput, start and memory](benchmarks.png)

## Aims, and what came out

{targets()}

What is missed, on this machine: the best peers are quantised as well, and hold the same products; what is won over them is what lies
around the products. OpenVINO's int8 is quicker for longer texts; this processor has a matrix unit (AMX), which other machines lack. Start and memory
are mostly those of Python and ONNX Runtime themselves, as the row of bare imports shows; llama.cpp's binding brings less. nano's two layers
wait for 3.5 MB of weights; a static table of vectors, with which it is compared, multiplies nothing. Among thousands of agents a decision is as long as its ranking.

## Latency

{latency.head("python -m benchmarks latency --gguf FILE")} Warm, milliseconds; texts of exactly so many tokens.

{side_by_side(latency, latency.cases("p50"), "p50", "p50, ms")}

Memory of the processes afterwards, MB:

{side_by_side(latency, latency.cases("rss"), "rss", "resident")}

{absent(latency)}

{notes(latency)}

## Throughput

{throughput.head("python -m benchmarks throughput")} Texts a second; the ratio is above 1 where a peer is quicker.

{side_by_side(throughput, throughput.cases("rate"), "rate", "texts/s")}

Largest memory, MB:

{side_by_side(throughput, throughput.cases("peak"), "peak", "peak")}

{absent(throughput)}

{notes(throughput)}

## Cold start

{cold.head("python -m benchmarks cold")} Seconds of a whole process, and its largest memory; ratios are to bare imports.

{side_by_side(cold, cold.cases("wall"), "wall", "wall, s")}

{side_by_side(cold, cold.cases("peak"), "peak", "peak, MB")}

{absent(cold)}

## Accuracy

{accuracy.head("python -m benchmarks accuracy --routers FILES")}

{table(["router", *counts, f"out of scope, abstained (n = {accuracy.rows['out-of-scope', routers[0], 'out-of-scope abstained']['n']})"], right)}

{notes(accuracy)}

## Cost as things grow

{curves.head("python -m benchmarks curves")} Ratios are to the smallest setting.

![Cost curves](curves.png)

{table(["setting", "what", "median", "ratio"], grown)}

{notes(curves)}

## The machine's limit

{limit.head("python -m benchmarks limit")} One thread. "Products": a graph that has nothing but the matrix products by weights, of the
same shapes, through the same library; for int8 once with activations scaled at run time, as the graph does, and once integers to integers.

![Roofline](roofline.png)

{table(["tokens", "graph", "MOP", "weights, MB", "session, ms", "session / products", "/ integer products", "/ roofline"], limits)}

What became of the rest is told in [performance](performance.md).

{notes(limit)}
"""


def parts_block() -> str:
    result = Result("limit")
    case = "parts of route, 12 tokens, one thread"
    whole = "whole calls, 12 tokens, one thread"
    head = ["12 tokens, one thread, ms (share of the session)", "ruvltra-mini int8", "ruvltra-nano int8"]
    names = ["session", "encode", "route"]
    lines = [[what, *(_part(result, whole, f"{name}, {what}") for name in ("mini", "nano"))] for what in names]
    parts = [subject.removeprefix("mini, ") for subject in result.subjects(case, "p50") if subject.startswith("mini")]
    lines += [[what, *(_part(result, case, f"{name}, {what}") for name in ("mini", "nano"))] for what in parts]
    operators = [
        f"{subject.partition(', ')[2]} {row['value']:.0%}"
        for (_, subject, measure), row in result.rows.items()
        if measure == "share" and subject.startswith(OURS) and row["value"] >= 0.02
    ]
    return (
        f"{table(head, lines)}\n\nWithin mini's session, by ONNX Runtime's profiler, which makes small operators look larger: "
        f"{', '.join(operators)}."
    )


def _part(result: Result, case: str, subject: str) -> str:
    row = result.rows[case, subject, "p50"]
    return f"{number(row['value'])} ({number(row['ratio'])})"


def before_block() -> str:
    result = Result("before")
    lines = []
    for case in result.cases("p50"):
        then, now = (result.rows[case, subject, "p50"] for subject in result.subjects(case, "p50"))
        ratio = f"{number(now['ratio'])} [{number(now['ratio_low'])}, {number(now['ratio_high'])}]"
        lines.append([case, number(then["value"]), number(now["value"]), ratio])
    return table(["one thread, ms", "before", "now", "ratio [quartiles]"], lines)


def browser_block() -> str:
    result = Result("browser")
    first, routes = "from nothing to the first decision", "a decision, 200 tasks"
    lines = [
        [name, _middle(result, first, name, "first"), timed(result.rows[routes, name, "p50"])]
        for name in ("Python", "Node", "Chromium")
    ]
    head = ["ms", "first decision [quartiles]", "a decision (ratio to Python's [quartiles])"]
    return f"{table(head, lines)}\n\n{result.head('python -m benchmarks browser')}"


def _middle(result: Result, case: str, subject: str, measure: str) -> str:
    row = result.rows.get((case, subject, measure))
    return "-" if row is None else f"{number(row['value'])} [{number(row['low'])}, {number(row['high'])}]"


def hook_block() -> str:
    result = Result("hook")
    lines = [[name, timed(result.rows["one process", name, "wall"])] for name in result.subjects("one process", "wall")]
    return f"{table(['', 's (ratio [quartiles])'], lines)}\n\n{result.head('python -m benchmarks hook')}"


def serve_block() -> str:
    result = Result("serve")
    lines = []
    for subject in result.subjects("in turn", "rate"):
        cells = [timed(result.rows["in turn", subject, measure]) for measure in ("rate", "p99")]
        lines.append([subject, *cells])
    (long,) = {case for case, _, measure in result.rows if measure == "errors"}
    told = [
        f"{subject}: {number(result.value(long, subject, 'rate'))} requests a second, 99 % within "
        f"{number(result.value(long, subject, 'p99'))} ms, {number(result.value(long, subject, 'errors'))} errors, memory "
        f"{result.value(long, subject, 'growth'):+.1f} MB"
        for subject in result.subjects(long, "errors")
    ]
    head = ["32 connections", "requests/s (ratio [quartiles])", "99 % within, ms (ratio [quartiles])"]
    return f"{table(head, lines)}\n\nIn {long}: {'; '.join(told)}.\n\n{result.head('python -m benchmarks serve')}"


def filled(text: str) -> str:
    """A page with its figures written anew."""
    blocks = {
        "accuracy": accuracy_block,
        "speed": speed_block,
        "size": size_block,
        "parts": parts_block,
        "before": before_block,
        "browser": browser_block,
        "hook": hook_block,
        "serve": serve_block,
    }
    return _BLOCK.sub(lambda found: f"{found.group(1)}{blocks[found.group(2)]()}\n{found.group(3)}", text)


def plot(path: Path) -> None:
    """Horizontal bars, whiskers are quartiles."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    latency, throughput, cold = Result("latency"), Result("throughput"), Result("cold")
    panels = (
        (latency, "12 tokens, 1 thread", "p50", "one text or decision of 12 tokens, ms"),
        (throughput, "2 threads", "rate", "texts a second, two threads"),
        (cold, "one process, wall time", "wall", "a whole process, s"),
        (cold, "one process, peak memory", "peak", "its memory, MB"),
    )
    figure = Figure(figsize=(14, 14), layout="constrained", facecolor="white")
    for axis, (result, case, measure, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        rows = sorted(
            (row for key, row in result.rows.items() if (key[0], key[2]) == (case, measure)), key=lambda r: r["value"]
        )
        if measure == "rate":
            rows.reverse()
        names = [row["subject"] for row in rows]
        colours = ["tab:blue" if name.startswith("ruvltra") else "tab:gray" for name in names]
        values = [row["value"] for row in rows]
        spread = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
        axis.barh(names, values, color=colours, xerr=spread, error_kw={"linewidth": 1})
        axis.invert_yaxis()
        axis.set(xscale="log", title=title)
        axis.tick_params(axis="y", labelsize=8)
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 3)), minor_formatter=NullFormatter())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Write everything."""
    (ROOT / "docs" / "benchmarks.md").write_text(page(), encoding="utf-8")
    for path in FILLED:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    plot(ROOT / "docs" / "benchmarks.png")


if __name__ == "__main__":
    main()
