"""The variants of a graph: what each one is, how it is made of the fp32 graph, and what it must hold to.

Every step asserts its effect, since the tools used here are known to pass over what they do not
recognise without a word.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge.session import NOT_FUSED
from export.decoder import quantise_table
from export.errors import ToolchainError
from export.lean import shorten_int8
from export.onnx import INPUTS, assert_symbolic, operators, quiet, save_with_weights

_REMEDY = "Install the tested onnxruntime."
_DECODERS_BLOCK = 32  # weights that share a scale in decoders, whose activations have outliers
_MOST_KEPT = 3  # down-projections left in fp32 at most; further ones bring little for their bytes
Ids = Sequence[Sequence[int]]
Make = Callable[[Path, Path, int, Ids], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant.

    Attributes:
        precision: How weights and activations are held, for the manifest.
        minimum_cosine: Lowest cosine to the fp32 graph on tasks, run as the runtime runs them.
        elsewhere: The same on padded batches and on strings that are no tasks, where the gate is
            against breakage: graphs that scale activations by the whole tensor drift there.
        make: (fp32 graph, where to write, matrix products to leave in fp32, calibration ids).
        keeps: How many products may be left in fp32 to meet the bound.
    """

    precision: str
    minimum_cosine: float
    elsewhere: float
    make: Make
    keeps: int = 0


def fp16(source: Path, target: Path, keep: int, ids: Ids) -> None:
    """Weights and activations in half precision; inputs and outputs as before."""
    del keep, ids
    from onnxruntime.transformers.float16 import convert_float_to_float16

    graph = onnx.load(source)
    before = operators(graph)
    with quiet("the conversion to float16"):
        graph = convert_float_to_float16(graph, keep_io_types=True, disable_shape_infer=True)
    left = [i.name for i in graph.graph.initializer if i.data_type == TensorProto.FLOAT and len(i.dims) == 2]
    after = operators(graph)
    changed = sorted(name for name in before if after[name] != before[name] and name != "Cast")
    if left or changed:
        raise ToolchainError(f"half precision left the matrices {left[:3]} or changed {changed}. {_REMEDY}")
    _finish(graph, target)


def int8(source: Path, target: Path, keep: int, ids: Ids) -> None:
    """Dynamic int8.

    Matrix products have weights int8 per output channel, activations uint8 with one scale per tensor
    computed at run time (hence not batch-invariant). ``reduce_range`` keeps weights to 7 bits, so
    that CPUs without VNNI do not saturate and all x86 CPUs agree. The word embedding table is int8
    with one scale per row. The feed-forward down-projections are what may stay in fp32, from the
    first layer on: their inputs have the outliers that cost most of the precision.
    """
    del ids
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _folder(target) as folder:
        middle, raw = folder / "table.onnx", folder / "raw.onnx"
        products, down = _with_int8_table(source, middle)
        with quiet("dynamic quantisation"):
            quantize_dynamic(
                middle,
                raw,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=down[:keep],
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True},
            )
        quantised = _fused(raw, folder / "fused.onnx")
        within = shorten_int8(quantised)
        save_with_weights(quantised, target)
    counts = operators(quantised)
    done = counts["DynamicQuantizeMatMul"] + counts["MatMulIntegerToFloat"] + within
    if done != len(products) - len(down[:keep]) or done == 0:
        raise ToolchainError(f"{done} of {len(products)} matrix products were quantised. {_REMEDY}")


def int8_static(source: Path, target: Path, keep: int, ids: Ids) -> None:
    """Static int8: activations scaled by what calibration tasks showed (QDQ), weights per channel.

    The feed-forward down-projections always stay in fp32: with their outliers a fixed scale is no use.
    """
    del keep
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(ids)

        def get_next(self) -> dict[str, NDArray[np.int64]] | None:
            row = next(self._rows, None)
            if row is None:
                return None
            array = np.array([row], dtype=np.int64)
            return dict(zip(INPUTS, (array, np.ones_like(array)), strict=True))

    with _folder(target) as folder:
        middle, raw = folder / "table.onnx", folder / "raw.onnx"
        products, down = _with_int8_table(source, middle)
        with quiet("static quantisation"):
            quantize_static(
                middle,
                raw,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=down,
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True},
            )
        quantised = onnx.load(raw)
        save_with_weights(quantised, target)
    scaled = {i.name for i in quantised.graph.initializer if i.data_type == TensorProto.INT8 and len(i.dims) == 2}
    done = len([name for name in scaled if not name.endswith(".int8")])
    if done != len(products) - len(down) or done == 0:
        raise ToolchainError(f"{done} of {len(products) - len(down)} matrix products were quantised. {_REMEDY}")
    assert_symbolic(quantised)


def weights_only(bits: int, block: int, symmetric: bool, down_bits: int | None = None, table_bits: int = 8) -> Make:
    """Weights of 8 or 4 bits in blocks, each with a scale; activations are quantised within the product.

    Args:
        bits: Of the weights.
        block: Weights a scale is shared by, along the input.
        symmetric: No zero points.
        down_bits: Other bits for the feed-forward down-projections.
        table_bits: Of the embedding table: 8, one scale a row, or 4, in blocks of its own.
    """

    def make(source: Path, target: Path, keep: int, ids: Ids) -> None:
        del keep, ids
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        graph = onnx.load(source)
        products, down = _products(graph)
        decoder = operators(graph)["GroupQueryAttention"] > 0
        size = min(block, _DECODERS_BLOCK) if decoder else block
        if table_bits == 8 and decoder:
            quantise_table(graph)  # so that an output layer can share it
        elif table_bits == 8:
            _quantise_table(graph)
        rest = [node.name for node in products if node.name not in down]
        rounds = [(bits, [])] if down_bits is None else [(bits, down), (down_bits, rest)]
        for width, exclude in rounds:
            config = DefaultWeightOnlyQuantConfig(size, symmetric, accuracy_level=4, bits=width)
            with quiet("weight-only quantisation"):
                quantiser = MatMulNBitsQuantizer(graph, nodes_to_exclude=list(exclude), algo_config=config)
                quantiser.process()
            graph = quantiser.model.model
        if table_bits == 4:
            # Only products are left out by name, and all are done; what remains is the table.
            config = DefaultWeightOnlyQuantConfig(
                block, symmetric, bits=4, op_types_to_quantize=("Gather",), quant_axes=(("Gather", 1),)
            )
            with quiet("weight-only quantisation"):
                quantiser = MatMulNBitsQuantizer(
                    graph, algo_config=config, op_types_to_quantize=("Gather",), quant_axes=(("Gather", 1),)
                )
                quantiser.process()
            graph = quantiser.model.model
            if operators(graph)["GatherBlockQuantized"] == 0:
                raise ToolchainError(f"the embedding table was not quantised. {_REMEDY}")
        done = [node for node in graph.graph.node if node.op_type == "MatMulNBits"]
        if len(done) != len(products) or not done:
            raise ToolchainError(f"{len(done)} of {len(products)} matrix products were quantised. {_REMEDY}")
        _finish(graph, target)

    return make


def fp32(source: Path, target: Path, keep: int, ids: Ids) -> None:
    """The graph as it was exported, which is there already."""
    del source, keep, ids
    assert target.exists()


# In the order in which a table shows them. The bounds can be changed by --minimum-cosine.
VARIANTS: dict[str, Variant] = {
    "fp32": Variant("float32 weights and activations", 0.999999, 0.999999, fp32),
    "fp16": Variant("float16 weights and activations", 0.999, 0.99, fp16),
    "int8": Variant(
        "int8 weights per channel, uint8 activations scaled per tensor at run time, int8 embedding rows",
        0.985,
        0.96,
        int8,
        keeps=_MOST_KEPT,
    ),
    "int8-static": Variant(
        "int8 weights per channel, uint8 activations of fixed scales, float32 down-projections, int8 embedding rows",
        0.97,
        0.9,
        int8_static,
    ),
    "int8-weights": Variant(
        "int8 weights in blocks of 128 (decoders: 32), float32 activations, int8 embedding rows",
        0.998,
        0.99,
        weights_only(8, 128, False),
    ),
    "int8-int4-weights": Variant(
        "int8 weights, int4 down-projections and int4 embedding table in blocks of 32, float32 activations",
        0.97,
        0.94,
        weights_only(8, 32, False, down_bits=4, table_bits=4),
    ),
    "int4-weights": Variant(
        "int4 weights with zero points in blocks of 32, float32 activations, int8 embedding rows",
        0.93,
        0.88,
        weights_only(4, 32, False),
    ),
    "int4-weights-symmetric": Variant(
        "int4 weights in blocks of 32, float32 activations, int8 embedding rows", 0.92, 0.86, weights_only(4, 32, True)
    ),
}


def _products(graph: onnx.ModelProto) -> tuple[list[onnx.NodeProto], list[str]]:
    """Matrix products by constant weights, and the names of the feed-forward down-projections."""
    shape_of = {i.name: tuple(i.dims) for i in graph.graph.initializer}
    products = [n for n in graph.graph.node if n.op_type == "MatMul" and n.input[1] in shape_of]
    # The feed-forward's inner size is the largest input of any product, and these are what takes it.
    widest = max((shape_of[n.input[1]][0] for n in products), default=0)
    down = [n.name for n in products if shape_of[n.input[1]][0] == widest > shape_of[n.input[1]][1]]
    return products, down


def _with_int8_table(source: Path, target: Path) -> tuple[list[onnx.NodeProto], list[str]]:
    """Write a graph anew with its embedding table quantised; returns its products as ``_products`` does."""
    graph = onnx.load(source)
    products, down = _products(graph)
    _quantise_table(graph)
    _save(graph, target)
    return products, down


def _quantise_table(graph: onnx.ModelProto) -> None:
    """Replace the largest table that is looked up by row with int8 rows and their scales."""
    tables = {i.name: i for i in graph.graph.initializer}
    lookups = [n for n in graph.graph.node if n.op_type == "Gather" and n.input[0] in tables]
    lookups = [n for n in lookups if len(tables[n.input[0]].dims) == 2]
    if not lookups:
        raise ToolchainError(f"found no embedding table in the graph. {_REMEDY}")
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


def _finish(graph: onnx.ModelProto, target: Path) -> None:
    assert_symbolic(graph)
    save_with_weights(graph, target)


def _save(graph: onnx.ModelProto, path: Path) -> None:
    """With weights beside it: a graph of 2 GB and more does not fit into one message."""
    onnx.save(graph, path, save_as_external_data=True, location=path.with_suffix(".data").name)


def _fused(path: Path, fused: Path) -> onnx.ModelProto:
    """The graph with what ONNX Runtime would fuse at every start fused now.

    "Extended" depends on the CPU provider, not on the CPU.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(fused)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", fused.stem + ".data")
    with quiet("ONNX Runtime's fusion"):
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=NOT_FUSED)
    graph = onnx.load(fused)
    assert_symbolic(graph)
    return graph


@contextlib.contextmanager
def _folder(beside: Path) -> Iterator[Path]:
    """A temporary folder beside a file, on the same disk."""
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=".quantise.") as name:
        yield Path(name)
