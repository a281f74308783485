"""How near is the runtime to the machine's limit, and where does the rest of the time go?

    python -m benchmarks.limit [--quick] [--json OUT] [--plot FILE.png]

One thread. Of each graph: the operations of its matrix products and the bytes of their weights; the time of its session
beside a graph that has nothing but these products, of the same shapes, through the same library (as the graph does
them: for int8 with the scaling of activations at run time; and bare, integers to integers); and beside the roofline:
the larger of its operations by the machine's best rate, which is that of one large product, and of the time of the same
products for one row, which do little but read the weights. Then the whole `route`
beside the session alone, and its stages, each timed behind a run of the session, as it finds the caches in use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

from benchmarks import texts
from benchmarks.environments import WORK
from benchmarks.peers.start import made
from benchmarks.record import ROOT, Row, document, save, show, timed
from edge import Bundle, Router
from edge.session import NOT_FUSED, check_unit_rows

LENGTHS = (1, 4, 12, 48, 128)
TOKENS = 12  # of a usual task
_LARGE = (1024, 1536, 1536)  # rows, inputs and outputs of the product that shows the best rate
# Operators that multiply by weights, and where the weights are among their inputs.
_PRODUCTS = {"MatMul": 1, "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1, "QAttention": 1}
_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Work:
    """What a graph multiplies.

    Attributes:
        shapes: (inputs, outputs) of each product by weights, in their order.
        integer: The weights are int8.
        width: Values of a token.
        layers: With attention, which multiplies tokens by tokens.
    """

    shapes: tuple[tuple[int, int], ...]
    integer: bool
    width: int
    layers: int

    def operations(self, tokens: int) -> int:
        """Multiplications and additions of one text."""
        by_weights = sum(inputs * outputs for inputs, outputs in self.shapes) * tokens
        return 2 * (by_weights + 2 * self.layers * tokens * tokens * self.width)

    @property
    def bytes(self) -> int:
        """Of the weights, which every text reads once."""
        return sum(inputs * outputs for inputs, outputs in self.shapes) * (1 if self.integer else 4)


def work_of(path: Path) -> Work:
    """Read off the graph's file."""
    graph = onnx.load(path, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = [
        tensors[node.input[place]]
        for node in graph.node
        if (place := _PRODUCTS.get(node.op_type)) is not None and node.input[place] in tensors
    ]
    shapes = tuple((tensor.dims[0], tensor.dims[1]) for tensor in weights)
    layers = sum(node.op_type in ("QAttention", "MultiHeadAttention") for node in graph.node)
    return Work(shapes, all(tensor.data_type == TensorProto.INT8 for tensor in weights), shapes[0][0], layers)


def products(shapes: Sequence[tuple[int, int]], kind: str, rows: int) -> Callable[[], object]:
    """A run of a graph of products only: ``float``, ``scaled`` (as dynamic int8 does them) or ``integer``."""
    random = np.random.default_rng(0)
    nodes, weights, outputs, fed = [], {}, [], {}
    for number, (inputs, width) in enumerate(shapes):
        source, name = f"x{inputs}", f"y{number}"
        matrix = random.integers(-64, 64, (inputs, width)).astype(np.int8)
        values = random.standard_normal((1, rows, inputs)).astype(np.float32)
        if kind == "float":
            weights[f"{name}.weight"] = matrix.astype(np.float32)
            nodes.append(helper.make_node("MatMul", [source, f"{name}.weight"], [name]))
        elif kind == "scaled":
            weights |= {f"{name}.weight": matrix, f"{name}.scale": np.full(width, 0.01, dtype=np.float32)}
            wanted = [source, f"{name}.weight", f"{name}.scale"]
            nodes.append(helper.make_node("DynamicQuantizeMatMul", wanted, [name], domain=_DOMAIN))
        else:
            weights |= {f"{name}.weight": matrix, "middle": np.array(128, dtype=np.uint8)}
            nodes.append(helper.make_node("MatMulInteger", [source, f"{name}.weight", "middle"], [name]))
            values = random.integers(0, 255, (1, rows, inputs)).astype(np.uint8)
        fed[source] = values
        of = TensorProto.INT32 if kind == "integer" else TensorProto.FLOAT
        outputs.append(helper.make_tensor_value_info(name, of, [1, rows, width]))
    of = TensorProto.UINT8 if kind == "integer" else TensorProto.FLOAT
    takes = [helper.make_tensor_value_info(name, of, list(value.shape)) for name, value in fed.items()]
    held = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "products", takes, outputs, held)
    versions = [helper.make_opsetid("", 18), helper.make_opsetid(_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), one_thread(), providers=["CPUExecutionProvider"])
    return partial(session.run, None, fed)


def one_thread() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def session_of(path: Path, profile: Path | None = None) -> ort.InferenceSession:
    """As the runtime makes it."""
    options = one_thread()
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=NOT_FUSED)


def in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, title: str, seconds: float = 0.03
) -> dict[str, list[float]]:
    """Milliseconds of each, a median a round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(rounds), desc=title, leave=False):
        for name, run in runs.items():
            run()
            times: list[float] = []
            end = time.perf_counter() + seconds
            while len(times) < 3 or time.perf_counter() < end:
                started = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - started))
            found[name].append(statistics.median(times))
    return found


def graphs() -> dict[str, Path]:
    """By name."""
    return {
        "ruvltra-mini int8": ROOT / "models/ruvltra-mini/bundle/model.int8.onnx",
        "ruvltra-mini fp32": made("mini-fp32", WORK.resolve()) / "model.fp32.onnx",
        "ruvltra-nano int8": ROOT / "models/ruvltra-nano/bundle/model.int8.onnx",
    }


def peaks(rounds: int) -> tuple[list[Row], dict[str, float], dict[str, float]]:
    """Rows; operations a millisecond and bytes a millisecond, by kind of product."""
    rows, best, wide = [], {}, {}
    count, inputs, outputs = _LARGE
    layer = [(384, 1152), (384, 384), (384, 1536), (1536, 384)] * 6  # mini's, whose weights fit into no second level
    for kind, size, name in (("float", 4, "fp32"), ("integer", 1, "int8")):
        runs = {"large": products([(inputs, outputs)], kind, count), "one row": products(layer, kind, 1)}
        times = in_turn(runs, rounds, f"peak {name}")
        read = size * sum(a * b for a, b in layer)
        best[name] = 2 * count * inputs * outputs / statistics.median(times["large"])
        wide[name] = read / statistics.median(times["one row"])
        rate = [2e-6 * count * inputs * outputs / value for value in times["large"]]
        width = [1e-6 * read / value for value in times["one row"]]
        rows += [
            timed("the machine, one thread", f"{name}, one large product", "rate", "GOP/s", rate, rate),
            timed("the machine, one thread", f"{name}, reading weights", "bandwidth", "GB/s", width, width),
        ]
    source = np.ones(2**25, dtype=np.float64)
    target = np.empty_like(source)
    copies = in_turn({"copy": partial(np.copyto, target, source)}, rounds, "copy")["copy"]
    width = [2e-6 * source.nbytes / value for value in copies]
    rows.append(timed("the machine, one thread", "copy of 256 MB (STREAM's copy)", "bandwidth", "GB/s", width, width))
    return rows, best, wide


def sessions(rounds: int, lengths: Sequence[int], best: Mapping[str, float]) -> list[Row]:
    """Each graph beside its products."""
    rows = []
    for name, path in graphs().items():
        work, session = work_of(path), session_of(path)
        kind = "int8" if work.integer else "fp32"
        read = statistics.median(
            in_turn({"one row": products(work.shapes, "integer" if work.integer else "float", 1)}, rounds, name)[
                "one row"
            ]
        )
        for tokens in lengths:
            ids = np.random.default_rng(1).integers(1000, 5000, (1, tokens))
            fed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            runs: dict[str, Callable[[], object]] = {"session": partial(session.run, None, fed)}
            runs["its products"] = products(work.shapes, "scaled" if work.integer else "float", tokens)
            if work.integer:
                runs["its products, integers to integers"] = products(work.shapes, "integer", tokens)
            times = in_turn(runs, rounds, f"{name}, {tokens} tokens")
            floor = max(work.operations(tokens) / best[kind], read)
            case = f"{tokens} tokens, one thread"
            for what, values in times.items():
                rows.append(timed(case, f"{name}, {what}", "p50", "ms", values, times["session"]))
            rows += [
                Row(case, f"{name}, roofline", "limit", "ms", floor, ratio=None),
                Row(case, f"{name}, operations", "work", "MOP", work.operations(tokens) / 1e6),
                Row(case, f"{name}, weights", "work", "MB", work.bytes / 1e6),
                *(
                    timed(case, f"{name}, session to {what}", "times", "", ratios, ratios)
                    for what, ratios in (
                        (what, [a / b for a, b in zip(times["session"], values, strict=True)])
                        for what, values in times.items()
                        if what != "session"
                    )
                ),
                Row(case, f"{name}, session to roofline", "times", "", statistics.median(times["session"]) / floor),
            ]
    return rows


def stages(name: str, rounds: int, count: int) -> list[Row]:
    """The whole route of a bundle beside its session alone; and its parts, each behind a run of the session."""
    router = Router.load(Bundle.open(ROOT / "models" / f"ruvltra-{name}" / "bundle"), device="cpu", threads=1)
    encoder = router.encoder
    assert encoder is not None
    tasks = texts.exactly(TOKENS, count)
    tokens = [encoder.tokenize(task) for task in tasks]
    signals = [router.signals(task) for task in tasks]
    session = session_of(ROOT / "models" / f"ruvltra-{name}" / "bundle" / "model.int8.onnx")
    ids = [np.array([one.ids], dtype=np.int64) for one in tokens]
    fed = [{"input_ids": one, "attention_mask": np.ones_like(one)} for one in ids]
    vectors = [session.run(None, one)[0] for one in fed]
    place = itertools.cycle(range(count))
    whole: dict[str, Callable[[], object]] = {
        "session": lambda: session.run(None, fed[next(place)]),
        "route": lambda: router.route(tasks[next(place)]),
        "encode": lambda: encoder.encode([tasks[next(place)]]),
    }
    times = in_turn(whole, rounds, f"{name}, route")
    case = f"{TOKENS} tokens, one thread"
    rows = [
        timed(f"whole calls, {case}", f"{name}, {what}", "p50", "ms", values, times["session"])
        for what, values in times.items()
    ]
    parts: dict[str, Callable[[int], object]] = {
        "keywords": lambda i: router._rules.match(tasks[i]),
        "tokenizer": lambda i: encoder.tokenize(tasks[i]),
        "ids to an array": lambda i: np.array([tokens[i].ids], dtype=np.int64),
        "check of the vector": lambda i: check_unit_rows(vectors[i], vectors[i].shape),
        "decision": lambda i: router.decide(signals[i], "hybrid"),
    }
    middle = statistics.median(times["session"])
    for what, part in parts.items():
        spent = []
        for number in range(rounds * 20):
            session.run(None, fed[number % count])
            started = time.perf_counter()
            part(number % count)
            spent.append(1e3 * (time.perf_counter() - started))
        rows.append(timed(f"parts of route, {case}", f"{name}, {what}", "p50", "ms", spent, [middle] * len(spent)))
    return rows


def profile(runs: int) -> list[Row]:
    """Share of each kind of operator in a session's time, by ONNX Runtime's profiler, which slows small ones."""
    rows = []
    for name, path in graphs().items():
        with tempfile.TemporaryDirectory() as folder:
            session = session_of(path, Path(folder, "profile"))
            ids = np.random.default_rng(1).integers(1000, 5000, (1, TOKENS))
            for _ in range(runs):
                session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        spent: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                spent[event["args"]["op_name"], event["name"]].append(event["dur"])
        by_operator: dict[str, list[float]] = defaultdict(list)
        for (operator, _), durations in spent.items():
            by_operator[operator].append(statistics.median(durations))
        total = sum(map(sum, by_operator.values()))
        for operator, each in sorted(by_operator.items(), key=lambda item: -sum(item[1])):
            subject = f"{name}, {len(each)} x {operator}"
            rows.append(Row(f"profile, {TOKENS} tokens", subject, "share", "", sum(each) / total, n=runs))
    return rows


def plot(rows: Sequence[Row], best: Mapping[str, float], wide: Mapping[str, float], path: Path) -> None:
    """The roofline: operations a byte against operations a second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    axis = figure.subplots()
    at = np.logspace(-0.5, 3.5, 200)
    for kind, colour in (("int8", "tab:blue"), ("fp32", "tab:red")):
        roof = np.minimum(best[kind], wide[kind] * at) * 1e-6
        axis.plot(at, roof, color=colour, label=f"{kind}: {best[kind] * 1e-6:.0f} GOP/s, {wide[kind] * 1e-6:.0f} GB/s")
    value = {(row.case, row.subject): row.value for row in rows}
    marks = {"ruvltra-mini int8": "o", "ruvltra-mini fp32": "s", "ruvltra-nano int8": "^"}
    for name, mark in marks.items():
        colour = "tab:red" if "fp32" in name else "tab:blue"
        for what, filled in (("session", True), ("its products", False)):
            points = []
            for (case, subject), milliseconds in value.items():
                if subject == f"{name}, {what}":
                    work = value[case, f"{name}, operations"]
                    points.append((work / value[case, f"{name}, weights"], work / milliseconds, case.split()[0]))
            face = colour if filled else "none"
            axis.plot(
                *zip(*[p[:2] for p in points], strict=True), mark, color=colour, mfc=face, label=f"{name}, {what}"
            )
            if filled and "nano" not in name:
                for x, y, tokens in points:
                    axis.annotate(f" {tokens}", (x, y), fontsize=8, va="top")
    axis.set(xscale="log", yscale="log", xlabel="operations a byte of weights", ylabel="GOP/s, one thread")
    axis.set_title("Roofline; numbers are tokens of the text", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, two lengths")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args(arguments)
    rounds = 5 if options.quick else 40
    rows, best, wide = peaks(rounds)
    rows += sessions(rounds, (4, TOKENS) if options.quick else LENGTHS, best)
    rows += stages("mini", rounds, 5) + stages("nano", rounds, 5)
    rows += profile(50 if options.quick else 400)
    notes: dict[str, Any] = {
        "ratios": "to the session of the same graph in the same round; of parts of route: to its median",
        "times": "how many times as long the session takes as the other does",
        "roofline": "the larger of operations / rate of one large product, and the time of its products for one row",
    }
    result = document("the limit of the machine", rows, quick=options.quick, packages={}, notes=notes)
    print(show(result))
    if options.json:
        save(options.json, result)
    if options.plot:
        plot(rows, best, wide, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
