"""ONNX graphs of the encoder: fp32 with fused operators, and int8 made of it.

Every step asserts its effect, since the tools used here are known to pass over what they do not
recognise without a word.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from export.errors import ToolchainError
from export.wrapper import SentenceEncoder

OPSET = 18
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "sentence_embedding"  # "embedding" collides with an internal name of torch's exporter


def export_fp32(model: SentenceEncoder, path: Path) -> None:
    """Write the encoder as one fp32 graph, weights beside it, with attention, layer norms and GELU fused.

    Inputs ``input_ids`` and ``attention_mask``, int64 (batch, tokens), both axes symbolic; output
    ``sentence_embedding``, float32 (batch, dim), unit rows.

    Raises:
        ToolchainError: An axis was fixed or a fusion did not happen.
    """
    from onnx_ir import save
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    # Neither axis of the example may be 1: torch.export would take it for a constant.
    example = (torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))
    with _quiet():
        program = torch.onnx.export(
            model.eval(),
            example,
            dynamo=True,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}),
            opset_version=OPSET,
            verbose=False,
        )
        if program is None:
            raise ToolchainError("torch.onnx.export returned nothing. Install the tested torch and onnxscript.")
        fused = optimize_for_ort(program.model)
        save(fused[0] if isinstance(fused, tuple) else fused, path)
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=False)
    save_with_weights(graph, path)
    _assert_symbolic(graph)
    layers = int(model.backbone.config.num_hidden_layers)
    counts = operators(graph)
    expected = {"MultiHeadAttention": layers, "SkipLayerNormalization": 2 * layers, "BiasGelu": layers, "Softmax": 0}
    found = {name: counts[name] for name in expected}
    if found != expected:
        raise ToolchainError(f"fusion gave {found}, {expected} expected. Install the tested torch and onnxscript.")


def quantise_int8(source: Path, target: Path, keep: int = 0) -> None:
    """Make an int8 graph of an fp32 one.

    Matrix products have weights int8 per output channel, activations uint8 with one scale per tensor
    computed at run time (hence not batch-invariant). ``reduce_range`` keeps weights to 7 bits, so
    that CPUs without VNNI do not saturate and all x86 CPUs agree. The word embedding table is int8
    with one scale per row, as plain Gather, Cast and Mul.

    Args:
        source: Graph written by :func:`export_fp32`.
        target: Where the int8 graph goes.
        keep: How many of the feed-forward down-projections stay in fp32, from the first layer on.
            Their inputs have the outliers that cost most of the precision.

    Raises:
        ToolchainError: A matrix product or the table was left in fp32 that should not have been.
    """
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(source)
    shape_of = {i.name: tuple(i.dims) for i in graph.graph.initializer}
    products = [n for n in graph.graph.node if n.op_type == "MatMul" and n.input[1] in shape_of]
    down = [n.name for n in products if shape_of[n.input[1]][0] > shape_of[n.input[1]][1]]
    _quantise_table(graph)
    middle = target.with_suffix(".table.onnx")
    onnx.save(graph, middle)
    try:
        with _quiet():
            quantize_dynamic(
                middle,
                target,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=down[:keep],
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        middle.unlink()
    # Fuse now what ONNX Runtime would fuse at every start. "Extended" depends on the CPU provider,
    # not on the CPU.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(middle)
    ort.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    quantised = onnx.load(middle)
    middle.unlink()
    _assert_symbolic(quantised)
    save_with_weights(quantised, target)
    counts = operators(quantised)
    done = counts["DynamicQuantizeMatMul"] + counts["MatMulIntegerToFloat"]
    if done != len(products) - keep or done == 0:
        raise ToolchainError(
            f"{done} of {len(products)} matrix products were quantised. Install the tested onnxruntime."
        )


def weights_path(path: Path) -> Path:
    """Where the weights of the graph at ``path`` are."""
    return path.with_suffix(".bin")


def save_with_weights(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph, and its weights to a file beside it, from where a runtime can map them."""
    weights_path(path).unlink(missing_ok=True)  # onnx would append
    onnx.save(
        graph,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=weights_path(path).name,
        size_threshold=1024,
    )


def operators(graph: onnx.ModelProto) -> Counter[str]:
    """How often each operator occurs in a graph."""
    return Counter(node.op_type for node in graph.graph.node)


def _assert_symbolic(graph: onnx.ModelProto) -> None:
    for value in graph.graph.input:
        dims = value.type.tensor_type.shape.dim
        if len(dims) != 2 or not all(dim.dim_param for dim in dims):
            raise ToolchainError(f"input {value.name} has fixed axes. Install the tested torch.")
    if tuple(value.name for value in graph.graph.input) != INPUTS:
        raise ToolchainError(f"the graph's inputs are not {INPUTS}. Install the tested torch.")


def _quantise_table(graph: onnx.ModelProto) -> None:
    """Replace the largest table that is looked up by row with int8 rows and their scales."""
    tables = {i.name: i for i in graph.graph.initializer}
    lookups = [n for n in graph.graph.node if n.op_type == "Gather" and n.input[0] in tables]
    lookups = [n for n in lookups if len(tables[n.input[0]].dims) == 2]
    if not lookups:
        raise ToolchainError("found no embedding table in the graph. Install the tested torch and onnxscript.")
    node = max(lookups, key=lambda n: int(np.prod(tables[n.input[0]].dims)))
    name, indices, output = node.input[0], node.input[1], node.output[0]
    rows = numpy_helper.to_array(tables[name])
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-12).astype(np.float32) / np.float32(127)
    values = np.clip(np.rint(rows / scale), -127, 127).astype(np.int8)
    graph.graph.initializer.remove(tables[name])
    graph.graph.initializer.extend(
        [numpy_helper.from_array(values, f"{name}.int8"), numpy_helper.from_array(scale, f"{name}.scale")]
    )
    replacement = [
        helper.make_node("Gather", [f"{name}.int8", indices], [f"{name}.rows"], axis=0),
        helper.make_node("Cast", [f"{name}.rows"], [f"{name}.rows.fp32"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}.scale", indices], [f"{name}.row_scales"], axis=0),
        helper.make_node("Mul", [f"{name}.rows.fp32", f"{name}.row_scales"], [output]),
    ]
    position = list(graph.graph.node).index(node)
    graph.graph.node.remove(node)
    for offset, new in enumerate(replacement):
        graph.graph.node.insert(position + offset, new)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tools' progress chatter and their warnings about their own internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
