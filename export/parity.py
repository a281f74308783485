"""Does an exported graph compute what the trained network computes? Measured, then gated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files

import numpy as np
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.wrapper import SentenceEncoder

Run = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]

# Lowest cosine to the trained network, on real texts run as the runtime runs them (one at a time).
MINIMUM_COSINE = {"fp32": 0.999999, "int8": 0.985}
# Batches and padding are no use case of the int8 graphs, which scale activations by the whole
# tensor; there the gate is against breakage, not drift.
MINIMUM_COSINE_PADDED = {"fp32": 0.999999, "int8": 0.96}


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, and how close it came.

    Attributes:
        variant: Which graph.
        texts: Number of real texts, each run alone without padding.
        cosine_min: Lowest cosine among them.
        cosine_mean: Mean cosine.
        worst: The text of the lowest cosine.
        nearest_agreement: Share of texts whose nearest other text is the same.
        grid: Cosine minimum for each shape of the grid, by name.
        failures: What missed its bound, in words; empty if nothing did.
    """

    variant: str
    texts: int
    cosine_min: float
    cosine_mean: float
    worst: str
    nearest_agreement: float
    grid: dict[str, float]
    failures: tuple[str, ...]

    def table(self) -> str:
        """The report as a few lines for a terminal."""
        lines = [
            f"{self.variant}: {self.texts} texts, cosine min {self.cosine_min:.7f} mean {self.cosine_mean:.7f}, "
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


def parity_texts() -> list[str]:
    """Texts to compare on: tasks of every kind, and strings that tokenizers trip over."""
    texts: list[str] = json.loads(files("export").joinpath("parity_texts.json").read_text(encoding="utf-8"))
    return texts


def compare(
    checkpoint: Checkpoint, model: SentenceEncoder, run: Run, variant: str, minimum_cosine: float | None = None
) -> Report:
    """Compare a graph with the network it was made from.

    Args:
        checkpoint: For its tokenizer and maximum length.
        model: The trained network, fp32.
        run: The graph: (batch, tokens) ids and mask to (batch, dim) vectors.
        variant: ``fp32`` or ``int8``; decides the bounds.
        minimum_cosine: Another bound for real texts.
    """
    bound = MINIMUM_COSINE[variant] if minimum_cosine is None else minimum_cosine
    texts = parity_texts()
    checkpoint.tokenizer.enable_truncation(checkpoint.max_length)
    ids = [encoding.ids for encoding in checkpoint.tokenizer.encode_batch(texts)]
    checkpoint.tokenizer.no_truncation()
    reference = np.concatenate([_torch(model, *_alone(row)) for row in ids])
    vectors = np.concatenate([run(*_alone(row)) for row in ids])
    cosines = _cosines(reference, vectors)
    grid = {name: _worst(model, run, *case) for name, case in _grid(ids, checkpoint.max_length).items()}
    failures = []
    if not cosines.min() >= bound:
        failures.append(f"cosine {cosines.min():.7f} is below {bound} for {texts[int(cosines.argmin())][:60]!r}")
    padded_bound = MINIMUM_COSINE_PADDED[variant]
    failures += [f"{n}: cosine {v:.7f} is below {padded_bound}" for n, v in grid.items() if not v >= padded_bound]
    return Report(
        variant=variant,
        texts=len(texts),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        worst=texts[int(cosines.argmin())],
        nearest_agreement=float(np.mean(_nearest(reference) == _nearest(vectors))),
        grid=grid,
        failures=tuple(failures),
    )


def _grid(ids: list[list[int]], longest: int) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
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


def _alone(row: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids = np.array([row], dtype=np.int64)
    return ids, np.ones_like(ids)


@torch.no_grad()
def _torch(model: SentenceEncoder, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    return result


def _worst(model: SentenceEncoder, run: Run, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> float:
    return float(_cosines(_torch(model, ids, mask), run(ids, mask)).min())


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosines: NDArray[np.float64] = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return cosines


def _nearest(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    nearest: NDArray[np.int64] = similarity.argmax(1)
    return nearest
