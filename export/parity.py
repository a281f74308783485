"""Does each stage of an export compute what the one before it computes? Measured, then gated.

The network as it is exported is held against the checkpoint's own code, the fp32 graph against the
network, and every other variant against the fp32 graph.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from edge.bundle import Golden
from edge.coreml import unit_rows
from edge.session import NOT_FUSED
from export.calibrate import Routed
from export.checkpoint import Checkpoint
from export.errors import ToolchainError
from export.mil import MilProgram, Mode
from export.onnx import INPUTS, quiet
from export.wrapper import SentenceEncoder

Run = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
Batch = tuple[NDArray[np.int64], NDArray[np.int64]]  # ids and mask
Case = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]  # and the expected vectors

# The first stage: the network as it is exported, against the checkpoint's own code.
NETWORK = "network"
NETWORK_BOUND = 0.999999
_LONGEST = 512  # tokens of the grid's longest text; attention over more takes memory by the square
_BATCHED = 64  # tokens of its longest batch of several texts


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, and how close it came.

    Attributes:
        stage: ``network`` or a variant.
        against: What it was held against, which an earlier stage has proven.
        texts: Number of tasks, each run alone without padding.
        cosine_min: Lowest cosine among them.
        cosine_mean: Mean cosine.
        nearest_agreement: Share of tasks whose nearest other task is the same.
        grid: Cosine minimum of the odd texts and of each shape of the grid, by name.
        failures: What missed its bound, in words; empty if nothing did.
        accuracy: Share of labelled tasks that the vectors alone route rightly, if any were given.
        agreement: Share of them that it routes to the same agent as fp32.
        maximum_drop: Share of them that the stage was allowed to lose against fp32.
        resident: Share of a CoreML package's multiplications that are in a form for the Neural Engine.
        seconds: What converting to a CoreML package took.
        bytes: Size of graph and weights; 0 where there is no graph.
    """

    stage: str
    against: str
    texts: int
    cosine_min: float
    cosine_mean: float
    nearest_agreement: float
    grid: dict[str, float]
    failures: tuple[str, ...]
    accuracy: float | None = None
    agreement: float | None = None
    maximum_drop: float | None = None
    resident: float | None = None
    seconds: float | None = None
    bytes: int = 0

    @property
    def grid_min(self) -> float:
        """Lowest cosine of the grid; where there is none, that of the tasks."""
        return float(np.min(list(self.grid.values()) or [self.cosine_min]))

    def measurements(self) -> dict[str, float]:
        """The figures that the manifest keeps."""
        values = asdict(self)
        kept = {key: values[key] for key in ("texts", "cosine_min", "cosine_mean", "nearest_agreement")}
        kept |= {"grid_cosine_min": self.grid_min}
        more = ("accuracy", "agreement", "maximum_drop", "resident")
        return kept | {key: values[key] for key in more if values[key] is not None}

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON, which has no word for what is not finite: null."""
        values = asdict(self) | {"failures": list(self.failures)}
        values["grid"] = {name: _or_null(value) for name, value in self.grid.items()}
        return {key: _or_null(value) for key, value in values.items()}


def table(reports: Sequence[Report]) -> str:
    """All stages as lines for a terminal; the first that failed is where the error came in."""
    lines = [
        f"{'stage':<24}{'against':<12}{'MB':>7}  {'cosine min':<12}{'mean':<12}{'nearest':<9}{'grid min':<11}accuracy"
    ]
    for r in reports:
        size = f"{r.bytes / 1e6:.1f}" if r.bytes else "-"
        accuracy = "-" if r.accuracy is None else f"{r.accuracy:.1%}"
        lines.append(
            f"{r.stage:<24}{r.against:<12}{size:>7}  {r.cosine_min:<12.7f}{r.cosine_mean:<12.7f}"
            f"{r.nearest_agreement:<9.1%}{r.grid_min:<11.7f}{accuracy}"
        )
        if r.resident is not None:
            share = f"{r.resident:.1%} of the multiplications in a form for the Neural Engine"
            lines.append(f"  {share}" if r.seconds is None else f"  converted in {r.seconds:.0f} s; {share}")
        lines += [f"  FAILED: {failure}" for failure in r.failures]
    failed = [r for r in reports if r.failures]
    if failed:
        lines.append(f"The error comes in at the stage {failed[0].stage!r}; what is before it holds.")
    return "\n".join(lines)


def parity_texts(kind: Literal["tasks", "odd", "calibration"]) -> list[str]:
    """Tasks in many languages and scripts and odd strings to compare on, or other tasks to calibrate with."""
    texts: dict[str, list[str]] = json.loads(files("export").joinpath("parity_texts.json").read_text(encoding="utf-8"))
    return texts[kind]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What stages are compared on: tasks and odd strings, each alone, and a grid of shapes."""

    texts: list[str]
    tasks: list[Batch]
    odd: list[Batch]
    grid: dict[str, Batch]

    @classmethod
    def of(
        cls,
        tokenize: Callable[[list[str]], list[list[int]]],
        max_length: int,
        padding: int = 0,
        sides: Sequence[str] = ("right",),
    ) -> Inputs:
        """Tokenise the exporter's own texts; ``padding`` is the id of padding, ``sides`` where it may be."""
        texts = parity_texts("tasks")
        tasks = tokenize(texts)
        grid = _grid(tasks, min(max_length, _LONGEST), padding, sides)
        return cls(texts, [_alone(r) for r in tasks], [_alone(r) for r in tokenize(parity_texts("odd"))], grid)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, longest: int | None = None) -> Inputs:
        """Padding comes on the left as well where a network numbers its positions by the mask.

        Not so for decoders: their quantised graphs make much of the least difference in the first tokens.

        Texts are cut to ``longest`` tokens where that is less than the checkpoint's own limit.
        """
        limit = min(checkpoint.max_length, longest or checkpoint.max_length)
        kind = checkpoint.backbone.config.model_type
        sides = ("right",) if kind in ("bert", "distilbert", "qwen2", "llama") else ("right", "left")
        return cls.of(lambda texts: checkpoint.tokenize(texts, limit), limit, checkpoint.padding, sides)

    @classmethod
    def of_goldens(cls, goldens: Sequence[Golden]) -> Inputs:
        """The texts of a bundle's goldens alone, by the ids that it states."""
        return cls([g.text for g in goldens], [_alone(list(g.ids)) for g in goldens], [], {})


class Reference:
    """The vectors of a stage, to hold the next one against."""

    def __init__(self, inputs: Inputs, name: str, run: Run) -> None:
        """Run a stage, by ``name``; this takes some seconds, comparing takes fewer."""
        self.name = name
        self._texts = inputs.texts
        self._tasks = _with_vectors(run, inputs.tasks)
        self._odd = _with_vectors(run, inputs.odd)
        self._grid = {name: _with_vectors(run, [case]) for name, case in inputs.grid.items()}

    def compare(self, run: Run, stage: str, minimum_cosine: float, elsewhere: float) -> Report:
        """Hold a stage against this one.

        Args:
            run: The stage: (batch, tokens) ids and mask to (batch, dim) vectors.
            stage: Its name.
            minimum_cosine: Bound for tasks.
            elsewhere: Bound for odd texts and the grid of shapes.
        """
        expected = np.concatenate([case[2] for case in self._tasks])
        vectors = np.concatenate([run(ids, mask) for ids, mask, _ in self._tasks])
        cosines = _cosines(expected, vectors)
        grid = {"odd texts": _lowest(run, self._odd)} if self._odd else {}
        grid |= {name: _lowest(run, cases) for name, cases in self._grid.items()}
        failures = []
        if not np.isfinite(vectors).all():
            failures.append("vectors of tasks are not finite")
        elif not cosines.min() >= minimum_cosine:
            worst = self._texts[int(cosines.argmin())][:60]
            failures.append(f"cosine {cosines.min():.7f} is below {minimum_cosine} for {worst!r}")
        failures += [
            f"{name}: cosine {value:.7f} is below {elsewhere}" if np.isfinite(value) else f"{name}: not finite"
            for name, value in grid.items()
            if not value >= elsewhere
        ]
        return Report(
            stage=stage,
            against=self.name,
            texts=len(self._texts),
            cosine_min=float(cosines.min()),
            cosine_mean=float(cosines.mean()),
            nearest_agreement=float(np.mean(_nearest(expected) == _nearest(vectors))),
            grid=grid,
            failures=tuple(failures),
        )


def refer_to_network(checkpoint: Checkpoint, inputs: Inputs) -> tuple[Reference, list[Report]]:
    """The network's vectors, and a report on them against the checkpoint's own code, where transformers has any."""
    reference = Reference(inputs, NETWORK, run_network(checkpoint))
    original = run_original(checkpoint)
    if original is None:
        return reference, []
    # The other way round, so that the network runs only once.
    report = reference.compare(original, NETWORK, NETWORK_BOUND, NETWORK_BOUND)
    return reference, [replace(report, against="checkpoint")]


def judge(
    report: Report, routed: Mapping[str, Routed], first: str, maximum_drop: float, same_decisions: bool = False
) -> Report:
    """A report with its routing accuracy; too large a drop against the stage ``first``, beyond chance, is a failure.

    One-sided sign test at 5 %, normal approximation, against the allowed drop.

    Args:
        report: Of a stage.
        routed: Where each stage routes the labelled tasks; without the stage ``first`` nothing is gated.
        first: What the drop is measured against.
        maximum_drop: The allowed share of tasks.
        same_decisions: That share bounds the tasks routed elsewhere as well, whichever is right; beyond chance, by
            a one-sided test at 5 % of their number, which is Poisson's.
    """
    own = routed.get(report.stage)
    if own is None:
        return report
    failures = report.failures
    agreement = None
    if first in routed:
        count = len(own.label)
        lost = int((routed[first].right & ~own.right).sum())
        gained = int((own.right & ~routed[first].right).sum())
        if lost - gained > maximum_drop * count + 1.645 * np.sqrt(lost + gained):
            failures += (
                f"routes {lost - gained} of {count} labelled tasks fewer rightly than {first}, more than "
                f"{maximum_drop:.1%} and chance allow",
            )
        elsewhere = int((routed[first].chosen != own.chosen).sum())
        agreement = 1 - elsewhere / count
        if same_decisions and _poisson_tail(elsewhere, maximum_drop * count) < 0.05:
            failures += (
                f"routes {elsewhere} of {count} labelled tasks elsewhere than {first}, more than {maximum_drop:.1%} "
                "and chance allow",
            )
    accuracy = float(own.right.mean())
    return replace(report, accuracy=accuracy, agreement=agreement, maximum_drop=maximum_drop, failures=failures)


def _poisson_tail(count: int, mean: float) -> float:
    """Chance of ``count`` or more where ``mean`` are expected."""
    logs = [i * math.log(mean) - mean - math.lgamma(i + 1) for i in range(count)] if mean else [0.0] * min(count, 1)
    return 1 - math.fsum(map(math.exp, logs))


class RunBackend:
    """A stage in the place of a bundle's back end, to route with it. Vectors are kept: tasks come twice.

    They are brought to length 1 and checked as the runtime does with a package's.
    """

    def __init__(self, run: Run) -> None:
        """Take a stage that embeds one text at a time."""
        self._run = run
        self._known: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """(1, tokens) ids and mask to a (1, dim) vector."""
        key = tuple(ids[0].tolist())
        if key not in self._known:
            vectors = self._run(ids, mask)
            self._known[key] = unit_rows(vectors, vectors.shape)
        return self._known[key]


def run_network(checkpoint: Checkpoint) -> Run:
    """The network as it is exported, in torch."""
    model = checkpoint.encoder().eval()

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            vectors: NDArray[np.float32] = model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
        return vectors

    return run


def run_original(checkpoint: Checkpoint) -> Run | None:
    """The checkpoint by transformers' own code, pooled; None where transformers has none."""
    backbone = checkpoint.backbone
    if not isinstance(backbone, PreTrainedModel):
        return None
    head = SentenceEncoder(nn.Identity(), checkpoint.pooling, checkpoint.dense).eval()

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            tokens = torch.from_numpy(mask)
            hidden = backbone(input_ids=torch.from_numpy(ids), attention_mask=tokens).last_hidden_state
            vectors: NDArray[np.float32] = head.pool(hidden, tokens).numpy()
        return vectors

    return run


def run_graph(path: Path) -> Run:
    """An ONNX graph, on the CPU."""
    with quiet(f"running {path.name}"):
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"], disabled_optimizers=NOT_FUSED)

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        with quiet(f"running {path.name}"):
            result: NDArray[np.float32] = session.run(None, dict(zip(INPUTS, (ids, mask), strict=True)))[0]
        return result

    return run


def run_package(program: MilProgram, mode: Mode = "declared") -> Run:
    """A CoreML package in the evaluator, each text padded to the shortest shape that holds it.

    Args:
        program: Of one input of ids and one output of vectors.
        mode: How the evaluator holds floats.
    """
    (name, taken), (output,) = *program.inputs.items(), program.outputs
    padding = int(program.spec.description.metadata.userDefined["padding_id"])  # the package makes its mask of it
    lengths = sorted(shape[1] for shape in taken.shapes)

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        length = next((n for n in lengths if n >= ids.shape[1]), None)
        if length is None:
            raise ToolchainError(f"{program.path}: takes {lengths[-1]} tokens, got {ids.shape[1]}. Shorten the text.")
        rows = np.full((len(ids), length), padding, np.int32)
        rows[:, : ids.shape[1]] = np.where(mask == 1, ids, padding)
        return np.concatenate([program.run({name: row[None]}, mode)[output] for row in rows])

    return run


def run_goldens(goldens: Sequence[Golden]) -> Run:
    """The vectors that a bundle states for its goldens' ids."""
    vectors = {golden.ids: golden.vector for golden in goldens}

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        del mask
        return np.stack([vectors[tuple(row)] for row in ids.tolist()])

    return run


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _grid(ids: list[list[int]], longest: int, padding: int, sides: Sequence[str]) -> dict[str, Batch]:
    """Batches of 1 and 8 at 1, 2, 13 and 64 tokens, and one text of ``longest``, full and heavily padded."""
    stream = [token for row in ids for token in row[1:-1]]
    stream *= 1 + 8 * longest // len(stream)
    first, last = ids[0][0], ids[0][-1]
    cases = {}
    for batch in (1, 8):
        for tokens in sorted({1, 2, 13, 64, longest}):
            if tokens > longest or (batch > 1 and tokens > _BATCHED):  # which would take a large network minutes
                continue
            block = np.array(stream[: batch * tokens], dtype=np.int64).reshape(batch, tokens)
            block[:, 0] = first
            if tokens > 1:
                block[:, -1] = last
            cases[f"batch {batch}, {tokens} tokens"] = (block, np.ones_like(block))
            for side in sides if tokens >= 13 else ():
                mask = np.zeros_like(block)
                for row in range(batch):
                    mask[row, : 2 + row] = 1
                if side == "left":
                    mask = mask[:, ::-1].copy()
                cases[f"batch {batch}, {tokens} tokens, padded {side}"] = (np.where(mask, block, padding), mask)
    return cases


def _alone(row: list[int]) -> Batch:
    ids = np.array([row], dtype=np.int64)
    return ids, np.ones_like(ids)


def _with_vectors(run: Run, batches: list[Batch]) -> list[Case]:
    return [(ids, mask, run(ids, mask)) for ids, mask in batches]


def _lowest(run: Run, cases: list[Case]) -> float:
    # numpy's minimum, since Python's may pass over what is not a number
    return float(np.min([_cosines(expected, run(ids, mask)).min() for ids, mask, expected in cases]))


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosines: NDArray[np.float64] = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return cosines


def _nearest(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    nearest: NDArray[np.int64] = similarity.argmax(1)
    return nearest
