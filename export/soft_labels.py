"""A larger teacher's probabilities for training tasks, kept in a small file.

The file holds no task, only digests of them: commit subjects are other people's words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from export.checkpoint import Checkpoint, Head
from export.dataset import normalise
from export.errors import CheckpointError, RecipeError
from export.heads import scores
from export.wrapper import embed

_STEPS = 255  # a probability is kept as so many parts of one


def write_soft_labels(
    path: Path, teacher: Checkpoint, texts: Sequence[str], temperature: float, quiet: bool = False
) -> int:
    """Ask a teacher about every text and write what it says; returns the number of tasks.

    Args:
        path: The file to write, safetensors: ``key`` int64 (n), ``probability`` uint8 (n, agents + 1).
        teacher: A fine-tuned checkpoint with a head.
        texts: The tasks.
        temperature: Of the softmax over the head's cosines; the teacher's own in training.
        quiet: No progress bar.

    Raises:
        CheckpointError: The teacher has no head.
    """
    if teacher.head is None:
        raise CheckpointError(f"{teacher.folder}: has no trained head to ask. Fine-tune it first.")
    tasks = sorted(set(texts), key=lambda task: (len(task), task))
    probability = ask(teacher, teacher.head, tasks, temperature, quiet)
    keys = torch.tensor([_key(task) for task in tasks])
    order = keys.argsort()
    partial = path.with_name(path.name + ".partial")
    save_file(
        {"key": keys[order], "probability": (probability[order] * _STEPS).round().to(torch.uint8)},
        partial,
        metadata={"agents": json.dumps(teacher.head.agents)},
    )
    partial.replace(path)
    return len(tasks)


def ask(teacher: Checkpoint, head: Head, tasks: list[str], temperature: float, quiet: bool = False) -> torch.Tensor:
    """(n, agents + 1) float32 probabilities of a teacher's head, the last for out of scope."""
    vectors = embed(teacher.encoder(), teacher.tokenize(tasks), "bfloat16", "" if quiet else "soft labels")
    outside = vectors @ head.out_of_scope
    said = torch.cat([scores(head, vectors), outside[:, None]], dim=1)
    return (said / temperature).softmax(1)


def read_soft_labels(path: Path, agents: list[str], texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """(agents + 1,) probabilities by task, for those of ``texts`` that the teacher was asked about.

    Raises:
        RecipeError: The file is missing or broken, is of other agents, or knows none of the tasks.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            known = json.loads((stream.metadata() or {})["agents"])
            keys, probability = stream.get_tensor("key").tolist(), stream.get_tensor("probability").float()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RecipeError(
            f"{path}: cannot be read as soft labels ({error}). Write it with: ruvltra-export soft-labels"
        ) from None
    if known != agents:
        raise RecipeError(f"{path}: is of the agents {', '.join(known)}. Write it again for the recipe's agents.")
    probability /= probability.sum(1, keepdim=True)
    row_of = dict(zip(keys, probability, strict=True))
    found = {text: row_of[key] for text in texts if (key := _key(text)) in row_of}
    if not found:
        raise RecipeError(f"{path}: knows none of the recipe's tasks. Write it again with: ruvltra-export soft-labels")
    return found


def _key(task: str) -> int:
    return int.from_bytes(hashlib.sha256(normalise(task).encode()).digest()[:8], "big", signed=True)
