"""A bundle's ONNX graph back to a checkpoint, so that a bundle can be trained on.

Only graphs that this exporter wrote are understood: their parameters keep the names of the network,
and each matrix is found by the bias that is added to its product.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from edge.bundle import Bundle
from edge.errors import BundleError
from export.checkpoint import Checkpoint, Head, Linear
from export.errors import CheckpointError
from export.lean import JOINED
from export.wrapper import BUNDLE_POOLING

_PREFIX = "backbone."


def unpack_bundle(path: Path) -> Checkpoint:
    """Rebuild the network from a bundle's most precise variant and prove it by the goldens.

    An int8 variant gives weights rounded to int8; the network is then as near to the original as the
    variant is.

    Raises:
        BundleError: The bundle cannot be used.
        CheckpointError: Its graph is not of this exporter's making, or the rebuilt network does not
            give the goldens' vectors.
    """
    bundle = Bundle.open(path)
    variant = max(bundle.variants, key=lambda v: (v.runtime == "onnx", v.minimum_cosine))
    if variant.runtime != "onnx" or variant.weights is None:
        raise CheckpointError(f"{path}: has no ONNX variant to train on. Give a checkpoint.")
    known = {name: mode for mode, name in BUNDLE_POOLING.items()}
    pooling = tuple(known.get(name, name) for name in bundle.encoder.pooling.split("+"))
    with tempfile.TemporaryDirectory() as folder:  # onnx reads external data from a folder only
        graph_path = Path(folder, "model.onnx")
        graph_path.write_bytes(bundle.read(variant.model))
        Path(folder, variant.weights.file).write_bytes(bundle.read(variant.weights))
        graph = onnx.load(graph_path).graph
    try:
        backbone = _backbone(graph)
    except (KeyError, ValueError, RuntimeError, StopIteration) as error:
        raise CheckpointError(
            f"{path}: its graph is not one that ruvltra-export made of a BERT ({error}). Give a checkpoint."
        ) from None
    head = None
    if bundle.head is not None:
        linear = None
        if bundle.head.linear is not None:
            linear = Linear(torch.tensor(bundle.head.linear.weight), torch.tensor(bundle.head.linear.bias))
        head = Head(
            tuple(agent.name for agent in bundle.agents),
            torch.tensor(bundle.head.prototypes),
            torch.tensor(bundle.head.out_of_scope),
            linear,
        )
    tokenizer = Tokenizer.from_buffer(bundle.tokenizer)
    checkpoint = Checkpoint(
        path, backbone, tokenizer, bundle.encoder.max_length, head, pooling=pooling, prompt=bundle.encoder.prompt
    )
    if checkpoint.dim != bundle.encoder.dim:
        raise CheckpointError(f"{path}: a graph with dense layers cannot be trained on. Give a checkpoint.")
    model = checkpoint.encoder().eval()
    for golden in bundle.goldens():
        with torch.no_grad():
            vector = model(torch.tensor([golden.ids]), torch.ones(1, len(golden.ids), dtype=torch.int64))[0].numpy()
        if float(vector @ golden.vector) < variant.minimum_cosine - 1e-3:
            raise CheckpointError(
                f"{path}: the network rebuilt from its graph does not give the golden vectors (cosine "
                f"{float(vector @ golden.vector):.4f} for {golden.text!r}). Give a checkpoint."
            )
    return checkpoint


def _joined(node: onnx.NodeProto, tensors: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Queries', keys' and values' parameters of an attention that holds them as one."""
    weight, bias, scale, zero_point = (tensors[node.input[place]] for place in (1, 2, 4, 7))
    query = node.input[2].removeprefix(_PREFIX).partition(f".bias{JOINED}")[0]
    matrices = np.split((weight.astype(np.float32) - zero_point) * scale, 3, axis=1)
    found: dict[str, NDArray[np.float32]] = {}
    for name, matrix, shift in zip(("query", "key", "value"), matrices, np.split(bias, 3), strict=True):
        place = f"{query.removesuffix('query')}{name}"
        found |= {f"{place}.weight": matrix.T, f"{place}.bias": shift}
    return found


def is_bundle(path: Path) -> bool:
    """Whether a bundle, rather than a checkpoint, lies here."""
    try:
        Bundle.open(path)
    except BundleError:
        return path.is_file()
    return True


def _backbone(graph: onnx.GraphProto) -> BertModel:
    tensors = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    state: dict[str, NDArray[np.float32]] = {}
    for name, values in tensors.items():
        if name.startswith(_PREFIX) and name.endswith((".weight", ".bias")) and JOINED not in name:
            state[name.removeprefix(_PREFIX)] = values
    for node in graph.node:
        if node.op_type == "QAttention":
            state |= _joined(node, tensors)
        if (
            node.op_type not in ("MatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
            or node.input[1] not in tensors
        ):
            continue
        matrix = tensors[node.input[1]]
        if node.op_type != "MatMul":
            scale, zero = (2, 3) if node.op_type == "DynamicQuantizeMatMul" else (3, 5)
            matrix = (matrix.astype(np.float32) - tensors[node.input[zero]]) * tensors[node.input[scale]]
        near = [*node.input, *(name for consumer in consumers[node.output[0]] for name in consumer.input)]
        bias = next(
            name for name in near if name.startswith(_PREFIX) and name.endswith(".bias") and "LayerNorm" not in name
        )
        state[bias.removeprefix(_PREFIX).removesuffix("bias") + "weight"] = matrix.T
    words = f"{_PREFIX}embeddings.word_embeddings.weight"
    if f"{words}.int8" in tensors:
        state["embeddings.word_embeddings.weight"] = (
            tensors[f"{words}.int8"].astype(np.float32) * tensors[f"{words}.scale"]
        )
    attention = [node for node in graph.node if node.op_type in ("MultiHeadAttention", "QAttention")]
    norm = next(node for node in graph.node if node.op_type == "LayerNormalization")
    vocabulary, dim = state["embeddings.word_embeddings.weight"].shape
    # The graph has them in its positions.
    state.setdefault("embeddings.token_type_embeddings.weight", np.zeros((2, dim), dtype=np.float32))
    config = BertConfig(  # type: ignore[no-untyped-call]
        vocab_size=vocabulary,
        hidden_size=dim,
        num_hidden_layers=len(attention),
        num_attention_heads=next(a.i for a in attention[0].attribute if a.name == "num_heads"),
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        layer_norm_eps=next(a.f for a in norm.attribute if a.name == "epsilon"),
    )
    config._attn_implementation = "eager"
    backbone = BertModel(config, add_pooling_layer=False)  # type: ignore[no-untyped-call]
    backbone.load_state_dict({name: torch.tensor(values) for name, values in state.items()})
    backbone.eval()  # type: ignore[no-untyped-call]
    return backbone
