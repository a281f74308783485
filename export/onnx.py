"""The ONNX graph of the encoder: fp32, with fused operators.

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

import onnx
import onnx_ir as ir
import torch
from onnx import helper

from edge.errors import EdgeError
from export.errors import ToolchainError
from export.lean import shorten_encoder
from export.wrapper import SentenceEncoder

OPSET = 18
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "sentence_embedding"  # "embedding" collides with an internal name of torch's exporter


def export_fp32(model: SentenceEncoder, path: Path) -> dict[str, int]:
    """Write the encoder as one fp32 graph, weights beside it, with attention, norms and GELU fused.

    Residual additions are left outside of the norms: ONNX Runtime 1.32 runs SkipLayerNormalization on
    one value at a time, and the whole int8 graph takes a fifth less time without it (``edge.session``
    keeps it from fusing them again).

    Inputs ``input_ids`` and ``attention_mask``, int64 (batch, tokens), both axes symbolic; output
    ``sentence_embedding``, float32 (batch, dim), unit rows.

    Returns:
        How often each fused operator occurs.

    Raises:
        ToolchainError: An axis was fixed or a fusion did not happen.
    """
    from onnx_ir import save

    from export.decoder import export_decoder, is_decoder  # which is built on this module

    if is_decoder(model):
        export_decoder(model, path)
        graph = onnx.load(path, load_external_data=False)
        assert_symbolic(graph)
        counts = operators(graph)
        return {name: counts[name] for name in ("GroupQueryAttention", "SkipSimplifiedLayerNormalization")}
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    # Neither axis of the example may be 1: torch.export would take it for a constant.
    example = (torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))
    with quiet("the ONNX export"):
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
        kind = str(model.backbone.config.model_type)
        fused = _fuse_rotary(program.model) if kind in _ROTARY else _fuse(program.model)
        if _EXPECTED[kind] is _BERT:
            shorten_encoder(fused, mean=model.pooling == ("mean",) and not len(model.dense))
        # Through a file: a graph of 2 GB and more does not fit into one message.
        weights_path(path).unlink(missing_ok=True)
        save(fused, path, external_data=weights_path(path).name, size_threshold_bytes=1024)
        graph = onnx.load(path, load_external_data=False)
        _split_skip_norms(graph)
        onnx.save(graph, path)  # the weights stay where they are
        if kind not in ("qwen2", "llama"):  # onnx's checker does not know SimplifiedLayerNormalization
            onnx.checker.check_model(str(path), full_check=False)
    assert_symbolic(graph)
    config = model.backbone.config
    counts = operators(graph)
    expected = {name: times * int(config.num_hidden_layers) + once for name, (times, once) in _EXPECTED[kind].items()}
    if next((a for key in _ACTIVATION if (a := getattr(config, key, None)) is not None), "gelu") != "gelu":
        expected = {name: count for name, count in expected.items() if name not in ("BiasGelu", "Gelu")}
    found = {name: counts[name] for name in expected}
    if found != expected:
        raise ToolchainError(f"fusion gave {found}, {expected} expected. Install the tested torch and onnxscript.")
    return found


# Fused operators that a graph must have: so many a layer, and so many besides. Attention with a bias of
# its own (MPNet) or a mask of its own making (DistilBERT) stays as it is.
_BERT = {"MultiHeadAttention": (1, 0), "LayerNormalization": (2, 1), "BiasGelu": (1, 0), "Softmax": (0, 0)}
_DECODER = {"MultiHeadAttention": (1, 0), "SkipSimplifiedLayerNormalization": (2, 0), "Softmax": (0, 0)}
_EXPECTED: dict[str, dict[str, tuple[int, int]]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "mpnet": {"LayerNormalization": (2, 1), "BiasGelu": (1, 0)},
    "distilbert": {"LayerNormalization": (2, 1), "BiasGelu": (1, 0)},
    "modernbert": {"MultiHeadAttention": (1, 0), "Gelu": (1, 0), "Softmax": (0, 0)},
    "nomic-bert": {"MultiHeadAttention": (1, 0), "LayerNormalization": (2, 1), "Softmax": (0, 0)},
    "qwen2": _DECODER,
    "llama": _DECODER,
}
# Where configurations name the feed-forward's activation. Only the exact GELU has fused operators.
_ACTIVATION = ("hidden_act", "activation", "hidden_activation")
_ROTARY = ("modernbert", "nomic-bert", "qwen2", "llama")


def _split_skip_norms(graph: onnx.ModelProto) -> None:
    """Replace each SkipLayerNormalization by its additions and a LayerNormalization."""
    nodes = []
    for node in graph.graph.node:
        if node.op_type != "SkipLayerNormalization":
            nodes.append(node)
            continue
        value, skip, scale, shift, *bias = node.input
        added = node.output[3] if len(node.output) > 3 and node.output[3] else f"{node.output[0]}.sum"
        if bias and bias[0]:
            nodes.append(helper.make_node("Add", [value, bias[0]], [f"{node.output[0]}.biased"]))
            value = f"{node.output[0]}.biased"
        nodes.append(helper.make_node("Add", [value, skip], [added]))
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        nodes.append(
            helper.make_node("LayerNormalization", [added, scale, shift], [node.output[0]], axis=-1, epsilon=epsilon)
        )
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _fuse(model: ir.Model) -> ir.Model:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    return optimize_for_ort(model)[0]


def _fuse_rotary(model: ir.Model) -> ir.Model:
    """What ``optimize_for_ort`` does, less the fusions that fail with rotary positions.

    Its GroupQueryAttention refuses padded batches, and its RotaryEmbedding refuses layers with caches
    of their own (onnxscript 0.7.2, ONNX Runtime 1.32.0).
    """
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import optimize
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.ort_fusions import shape_optimization
    from onnxscript.rewriter.ort_fusions.bias_gelu import fuse_bias_gelu
    from onnxscript.rewriter.ort_fusions.erfgelu import fuse_erfgelu
    from onnxscript.rewriter.ort_fusions.gelu import fuse_gelu
    from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
    from onnxscript.rewriter.ort_fusions.sdpa import fuse_sdpa
    from onnxscript.rewriter.ort_fusions.sdpa_via_mha import replace_sdpa_by_mha
    from onnxscript.rewriter.ort_fusions.skip_normalization import (
        fuse_skip_layer_normalization,
        fuse_skip_rms_normalization,
    )
    from onnxscript.rewriter.rules.common import _gemm_to_matmul_add

    rewrite(model, [_gemm_to_matmul_add.gemm_to_matmul_add_rule])
    passes.ShapeInferencePass()(model)
    optimize(model)
    shape_optimization.rules.apply_to_model(model)
    optimize(model)
    for fusion in (fuse_erfgelu, fuse_rms_normalization, fuse_skip_layer_normalization, fuse_skip_rms_normalization):
        fusion(model)
    fuse_sdpa(model, apply_shape_inference=True)
    for fusion in (fuse_gelu, fuse_bias_gelu, replace_sdpa_by_mha):
        fusion(model)
    optimize(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=1)(model)
    passes.RemoveInitializersFromInputsPass()(model)
    passes.ShapeInferencePass()(model)
    return model


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


def assert_symbolic(graph: onnx.ModelProto) -> None:
    """Raise ToolchainError unless batch and tokens are symbolic axes of the two inputs."""
    for value in graph.graph.input:
        dims = value.type.tensor_type.shape.dim
        if len(dims) != 2 or not all(dim.dim_param for dim in dims):
            raise ToolchainError(f"input {value.name} has fixed axes. Install the tested torch.")
    if tuple(value.name for value in graph.graph.input) != INPUTS:
        raise ToolchainError(f"the graph's inputs are not {INPUTS}. Install the tested torch.")


@contextlib.contextmanager
def quiet(stage: str) -> Iterator[None]:
    """Silence the tools' progress chatter and their warnings about their own internals.

    Raises:
        ToolchainError: A tool raised an exception of its own; the message names the stage.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (EdgeError, OSError, MemoryError):
        raise
    except Exception as error:  # torch, onnx, onnxruntime and optimum have no root in common
        reason = " ".join(str(error).split())[:300]
        raise ToolchainError(
            f"{stage} failed ({type(error).__name__}: {reason}). This model is beyond the tested tools: leave the "
            "variant out, or use another model."
        ) from error
    finally:
        logging.disable(disabled)
