"""The generating graphs of a causal language model: made of its embedding graphs, proven, calibrated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from edge.bundle import Bundle, Calibration
from edge.evaluate import Labelled
from edge.generate import Generator
from edge.router import Likelihoods
from export.calibrate import calibrate_likelihoods
from export.checkpoint import Checkpoint
from export.decoder import Cache, cache_of, is_decoder, write_generator
from export.errors import CheckpointError, ParityError
from export.onnx import quiet
from export.parity import parity_texts
from export.variants import VARIANTS

GENERATING = ("fp32", "int8-weights", "int4-weights")  # variants whose graphs can generate
STEPS = 4  # tokens generated one by one, each from the cache of the ones before
PROMPT = "Route: {task}\nAgent:"  # the origin's
_MOST = 600  # labelled tasks that a generator is calibrated on; each takes as long as an embedding, and more
UNCALIBRATED = Calibration(1.0, 0.0, 0.0, None, 0.0)


def check_generating(checkpoint: Checkpoint, variants: Sequence[str]) -> None:
    """Refuse what cannot generate before anything takes time.

    Raises:
        CheckpointError: It is no causal language model that these variants are made of.
    """
    if checkpoint.language_model is None:
        raise CheckpointError(
            f"{checkpoint.folder}: is no causal language model with its output layer, so it cannot generate. Leave "
            "--task generate out."
        )
    if not is_decoder(checkpoint.encoder()) or not any(variant in GENERATING for variant in variants):
        raise CheckpointError(
            f"{checkpoint.folder}: only Llama- and Qwen2-like models with SiLU that are pooled by the mean or the last "
            f"token generate, as {', '.join(GENERATING)}. Ask for one of these, or leave --task generate out."
        )


def export_generators(checkpoint: Checkpoint, folder: Path, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Make a generating graph of each embedding graph that can, and hold its greedy tokens against the network's.

    The graphs share the weights of ``model.VARIANT.bin``; only an output layer of its own is added to that file.

    Returns:
        The manifest's entries, files by name.

    Raises:
        ParityError: The fp32 graph gives another next token.
    """
    network = checkpoint.language_model
    assert network is not None
    cache = cache_of(network)
    end = network.config.eos_token_id
    entries = []
    for variant in variants:
        if variant not in GENERATING:
            continue
        path = folder / f"generator.{variant}.onnx"
        write_generator(folder / f"model.{variant}.onnx", path, network)
        texts, different = prove_generator(checkpoint, path, cache)
        if different and variant == "fp32":
            raise ParityError(
                f"the generator gives other next tokens than the network for {different[0]!r}. No bundle was written. "
                "Leave --task generate out.",
                f"generator: {texts - len(different)} of {texts} texts give the same {STEPS} tokens",
            )
        entries.append(
            {
                "id": variant,
                "model": path.name,
                "weights": f"model.{variant}.bin",
                "precision": VARIANTS[variant].precision,
                "layers": cache.layers,
                "kv_heads": cache.heads,
                "head_dim": cache.values,
                "end_ids": [] if end is None else [end] if isinstance(end, int) else list(end),
                "prompt": PROMPT,
                "prior": 0.0,
                "calibration": UNCALIBRATED._asdict(),
                "calibrated_on": None,
                "parity": {"texts": texts, "tokens_a_text": STEPS, "equal": 1 - len(different) / texts},
            }
        )
    return entries


def prove_generator(checkpoint: Checkpoint, path: Path, cache: Cache) -> tuple[int, list[str]]:
    """Hold a generating graph against the network: greedy tokens of the exporter's tasks, step by step.

    Returns:
        How many texts there were, and those for which the tokens differ.
    """
    texts = parity_texts("tasks")
    with quiet("running the generating graph"):
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        return len(texts), [
            text
            for text, row in zip(texts, checkpoint.tokenize(texts, min(64, checkpoint.max_length - STEPS)), strict=True)
            if next_tokens(session, row, cache, STEPS) != _network_tokens(checkpoint.language_model, row)
        ]


def calibrate_generator(
    bundle: Bundle, listed: dict[str, Any], labelled: Sequence[Labelled], names: Sequence[str]
) -> None:
    """Fit how likelihoods become probabilities, on labelled tasks spread over the file."""
    rows = [labelled[i] for i in np.unique(np.linspace(0, len(labelled) - 1, min(_MOST, len(labelled))).astype(int))]
    likelihoods = Likelihoods(Generator.load(bundle, generator=listed["id"]), listed["prompt"], names)
    found = np.stack([likelihoods.of(row.task)[0] for row in rows])
    prior, calibration = calibrate_likelihoods(found, likelihoods.empty, rows, names)
    listed["prior"] = round(prior, 5)
    listed["calibration"] = {
        key: None if value is None else round(value, 5) for key, value in calibration._asdict().items()
    }


def next_tokens(session: ort.InferenceSession, row: list[int], cache: Cache, count: int) -> list[int]:
    """The ``count`` greedy next tokens of a generating graph, each step fed with the last token and the cache."""
    names = [f"{i}.{kind}" for i, kind in itertools.product(range(cache.layers), ("key", "value"))]
    past: dict[str, NDArray[np.float32]] = {
        f"past.{name}": np.zeros((1, cache.heads, 0, cache.values), dtype=np.float32) for name in names
    }
    outputs = [output.name for output in session.get_outputs()]
    ids, seen, tokens = row, 0, list[int]()
    for _ in range(count):
        total = seen + len(ids)
        feed = {
            "input_ids": np.array([ids], dtype=np.int64),
            "position_ids": np.arange(seen, total, dtype=np.int64)[None],
            "attention_bias": np.zeros((1, 1, len(ids), total), dtype=np.float32),
            "lengths": np.array([total - 1], dtype=np.int32),
            "total": np.array(total, dtype=np.int32),
            "rows": np.array([len(ids) - 1], dtype=np.int64),
        }
        values = dict(zip(outputs, session.run(None, feed | past), strict=True))
        tokens.append(int(values["logits"][0].argmax()))
        past = {f"past.{name}": values[f"present.{name}"] for name in names}
        ids, seen = [tokens[-1]], total
    return tokens


@torch.no_grad()
def _network_tokens(network: Any, row: list[int]) -> list[int]:
    """The same by the network, which reads the whole text anew at each step."""
    ids = torch.tensor([row])
    for _ in range(STEPS):
        following = network(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], dim=1)
    return [int(token) for token in ids[0, len(row) :]]
