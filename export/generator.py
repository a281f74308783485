"""The generating graph of a causal language model: optimum's export with a key/value cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.errors import ParityError, ToolchainError
from export.onnx import quiet, save_with_weights
from export.parity import parity_texts

STEPS = 4  # tokens generated one by one, each from the cache of the ones before


def export_generator(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Write ``generator.fp32.onnx`` and prove it: the same next tokens as the network's, step by step.

    Inputs ``input_ids``, ``attention_mask``, ``position_ids`` and for each layer
    ``past_key_values.N.key`` and ``.value`` (batch, kv_heads, past, head_dim) float32; outputs
    ``logits`` (batch, tokens, vocabulary) and ``present.N.key``, ``present.N.value``.

    Returns:
        The manifest's entry, files by name.

    Raises:
        ParityError: A next token differs.
        ToolchainError: optimum gave a graph of other inputs.
    """
    network = checkpoint.language_model
    assert network is not None
    config = network.config
    from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory(dir=folder, prefix=".generator.") as name:
        source, raw = Path(name, "model"), Path(name, "onnx")
        with quiet("optimum's export of the generating graph"):
            network.save_pretrained(source)
            checkpoint.tokenizer.save(str(source / "tokenizer.json"))
            main_export(
                str(source), output=raw, task="text-generation-with-past", no_post_process=True, do_validation=False
            )
        graph = onnx.load(raw / "model.onnx")
        path = folder / "generator.fp32.onnx"
        save_with_weights(graph, path)
    names = {value.name for value in graph.graph.input}
    layers = int(config.num_hidden_layers)
    wanted = {"input_ids", "attention_mask", "position_ids"}
    wanted |= {f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")}
    if names != wanted:
        raise ToolchainError(f"the generator's inputs are {sorted(names)[:4]} ... Install the tested optimum-onnx.")
    end = config.eos_token_id
    entry: dict[str, Any] = {
        "id": "fp32",
        "model": path.name,
        "weights": path.with_suffix(".bin").name,
        "precision": "float32 weights and activations",
        "layers": layers,
        "kv_heads": int(config.num_key_value_heads),
        "head_dim": int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        "end_ids": [] if end is None else [end] if isinstance(end, int) else list(end),
    }
    texts, different = prove_generator(checkpoint, path, layers, entry["kv_heads"], entry["head_dim"])
    if different:
        raise ParityError(
            f"the generator gives other next tokens than the network for {different[0]!r}. No bundle was written. "
            "Leave --task generate out.",
            f"generator: {texts - len(different)} of {texts} texts give the same {STEPS} tokens",
        )
    return entry | {"parity": {"texts": texts, "tokens_a_text": STEPS, "equal": 1.0}}


def prove_generator(
    checkpoint: Checkpoint, path: Path, layers: int, kv_heads: int, head_dim: int
) -> tuple[int, list[str]]:
    """Hold a generating graph against the network: greedy tokens of the exporter's tasks, step by step.

    Returns:
        How many texts there were, and those for which the tokens differ.
    """
    texts = parity_texts("tasks")
    with quiet("running the generating graph"):
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        return len(texts), [
            text
            for text, row in zip(texts, checkpoint.tokenize(texts, 64), strict=True)
            if next_tokens(session, row, layers, kv_heads, head_dim, STEPS)
            != _network_tokens(checkpoint.language_model, row)
        ]


def next_tokens(
    session: ort.InferenceSession, row: list[int], layers: int, kv_heads: int, head_dim: int, count: int
) -> list[int]:
    """The ``count`` greedy next tokens of a generating graph, each step fed with the last token and the cache."""
    past: dict[str, NDArray[np.float32]] = {
        f"past_key_values.{i}.{kind}": np.zeros((1, kv_heads, 0, head_dim), dtype=np.float32)
        for i in range(layers)
        for kind in ("key", "value")
    }
    outputs = [output.name for output in session.get_outputs()]
    ids, seen, tokens = np.array([row], dtype=np.int64), 0, []
    for _ in range(count):
        total = seen + ids.shape[1]
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(seen, total, dtype=np.int64)[None],
        }
        values = dict(zip(outputs, session.run(None, feed | past), strict=True))
        tokens.append(int(values["logits"][0, -1].argmax()))
        past = {name.replace("present", "past_key_values"): v for name, v in values.items() if name != "logits"}
        ids, seen = np.array([[tokens[-1]]], dtype=np.int64), total
    return tokens


@torch.no_grad()
def _network_tokens(network: Any, row: list[int]) -> list[int]:
    """The same by the network, which reads the whole text anew at each step."""
    ids = torch.tensor([row])
    for _ in range(STEPS):
        following = network(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], dim=1)
    return [int(token) for token in ids[0, len(row) :]]
