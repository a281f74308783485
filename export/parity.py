"""Does an exported graph compute what the trained network computes? Measured, then gated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.wrapper import SentenceEncoder

Run = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
Batch = tuple[NDArray[np.int64], NDArray[np.int64]]  # ids and mask
Case = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]  # and the expected vectors

# Lowest cosine to the trained network, on tasks run as the runtime runs them (one at a time).
MINIMUM_COSINE = {"fp32": 0.999999, "int8": 0.985}
# Padded batches are no use case of the int8 graphs, which scale activations by the whole tensor, and
# texts such as "???" are no tasks; there the gate is against breakage, not drift.
MINIMUM_COSINE_ELSEWHERE = {"fp32": 0.999999, "int8": 0.96}


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, and how close it came.

    Attributes:
        variant: Which graph.
        texts: Number of tasks, each run alone without padding.
        cosine_min: Lowest cosine among them.
        cosine_mean: Mean cosine.
        nearest_agreement: Share of tasks whose nearest other task is the same.
        grid: Cosine minimum of the odd texts and of each shape of the grid, by name.
        failures: What missed its bound, in words; empty if nothing did.
    """

    variant: str
    texts: int
    cosine_min: float
    cosine_mean: float
    nearest_agreement: float
    grid: dict[str, float]
    failures: tuple[str, ...]

    def table(self) -> str:
        """The report as a few lines for a terminal."""
        lines = [
            f"{self.variant}: {self.texts} tasks, cosine min {self.cosine_min:.7f} mean {self.cosine_mean:.7f}, "
            f"nearest neighbour equal {self.nearest_agreement:.1%}",
            *(f"  {name:<28} cosine min {value:.7f}" for name, value in self.grid.items()),
            *(f"  FAILED: {failure}" for failure in self.failures),
        ]
        return "\n".join(lines)

    def measurements(self) -> dict[str, float]:
        """The figures that the manifest keeps."""
        values = asdict(self)
        kept = {key: values[key] for key in ("texts", "cosine_min", "cosine_mean", "nearest_agreement")}
        return kept | {"grid_cosine_min": min(self.grid.values())}


def parity_texts(kind: Literal["tasks", "odd"]) -> list[str]:
    """Texts to compare on: tasks in many languages and scripts, or strings that are no sentences."""
    texts: dict[str, list[str]] = json.loads(files("export").joinpath("parity_texts.json").read_text(encoding="utf-8"))
    return texts[kind]


class Reference:
    """The trained network's own vectors on texts and on a grid of shapes, to hold graphs against."""

    def __init__(self, checkpoint: Checkpoint, model: SentenceEncoder) -> None:
        """Run the network in fp32; this takes some seconds, comparing takes fewer."""
        self._texts = parity_texts("tasks")
        tasks, odd = checkpoint.tokenize(self._texts), checkpoint.tokenize(parity_texts("odd"))
        self._tasks = _run_torch(model, [_alone(row) for row in tasks])
        self._odd = _run_torch(model, [_alone(row) for row in odd])
        self._grid = {name: _run_torch(model, [case]) for name, case in _grid(tasks, checkpoint.max_length).items()}

    def compare(self, run: Run, variant: str, minimum_cosine: float) -> Report:
        """Hold a graph against the network.

        Args:
            run: The graph: (batch, tokens) ids and mask to (batch, dim) vectors.
            variant: ``fp32`` or ``int8``.
            minimum_cosine: Bound for tasks; ``MINIMUM_COSINE_ELSEWHERE`` holds for the rest.
        """
        expected = np.concatenate([case[2] for case in self._tasks])
        vectors = np.concatenate([run(ids, mask) for ids, mask, _ in self._tasks])
        cosines = _cosines(expected, vectors)
        grid = {"odd texts": _lowest(run, self._odd)}
        grid |= {name: _lowest(run, cases) for name, cases in self._grid.items()}
        failures = []
        if not cosines.min() >= minimum_cosine:
            worst = self._texts[int(cosines.argmin())][:60]
            failures.append(f"cosine {cosines.min():.7f} is below {minimum_cosine} for {worst!r}")
        floor = MINIMUM_COSINE_ELSEWHERE[variant]
        failures += [
            f"{name}: cosine {value:.7f} is below {floor}" for name, value in grid.items() if not value >= floor
        ]
        return Report(
            variant=variant,
            texts=len(self._texts),
            cosine_min=float(cosines.min()),
            cosine_mean=float(cosines.mean()),
            nearest_agreement=float(np.mean(_nearest(expected) == _nearest(vectors))),
            grid=grid,
            failures=tuple(failures),
        )


def _grid(ids: list[list[int]], longest: int) -> dict[str, Batch]:
    """Batches of 1 and 8 at 1, 2, 12, 64 and the maximum of tokens, full and heavily padded."""
    stream = [token for row in ids for token in row[1:-1]]
    stream *= 1 + 8 * longest // len(stream)
    first, last = ids[0][0], ids[0][-1]
    cases = {}
    for batch in (1, 8):
        for tokens in sorted({1, 2, 12, 64, longest}):
            if tokens > longest:
                continue
            block = np.array(stream[: batch * tokens], dtype=np.int64).reshape(batch, tokens)
            block[:, 0] = first
            if tokens > 1:
                block[:, -1] = last
            cases[f"batch {batch}, {tokens} tokens"] = (block, np.ones_like(block))
            if tokens >= 12:
                mask = np.zeros_like(block)
                for row in range(batch):
                    mask[row, : 2 + row] = 1
                cases[f"batch {batch}, {tokens} tokens, padded"] = (block * mask, mask)
    return cases


def _alone(row: list[int]) -> Batch:
    ids = np.array([row], dtype=np.int64)
    return ids, np.ones_like(ids)


@torch.no_grad()
def _run_torch(model: SentenceEncoder, batches: list[Batch]) -> list[Case]:
    return [(ids, mask, model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()) for ids, mask in batches]


def _lowest(run: Run, cases: list[Case]) -> float:
    return min(float(_cosines(expected, run(ids, mask)).min()) for ids, mask, expected in cases)


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosines: NDArray[np.float64] = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return cosines


def _nearest(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    nearest: NDArray[np.int64] = similarity.argmax(1)
    return nearest
