"""What a BERT's graph computes besides arithmetic, taken out: masks as large as attention, lookups of constants, glue.

Each operator costs some time however little it does, and a short text takes little in all (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.errors import ToolchainError

JOINED = ".to_value"  # what is made of a query's, a key's and a value's: in the name, behind that of the query's bias
_FUSED = "com.microsoft"
_REMEDY = "Install the tested torch and onnxscript."


def shorten_encoder(model: ir.Model, mean: bool) -> None:
    """Rewrite an exported and fused BERT.

    The mask goes to attention as it is, (batch, tokens), instead of as (batch, heads, tokens, tokens) numbers to add;
    positions and the one type of tokens become one table, read from its beginning; the mean over tokens becomes a
    product with the mask, and is not divided before it is normalised.

    Args:
        model: Of a ``bert``, ``roberta`` or ``xlm-roberta``; changed in place.
        mean: Its output is the normalised mean over tokens.

    Raises:
        ToolchainError: The graph has another form than torch's exporter gives it.
    """
    graph = model.graph
    ids, mask = graph.inputs
    attention = [node for node in graph if node.op_type == "MultiHeadAttention"]
    whole = _put(attention[0], "Cast", [mask], to=ir.DataType.INT32)
    for node in attention:
        if len(node.inputs) != 6 or node.inputs[5] is None or node.inputs[4] is not None:
            raise ToolchainError(f"attention has {len(node.inputs)} inputs, a mask as the sixth expected. {_REMEDY}")
        node.replace_input_with(4, whole)
        node.replace_input_with(5, None)
    _join_tables(graph, ids)
    if mean:
        _shorten_mean(graph, mask)
    RemoveUnusedNodesPass()(model)


def _join_tables(graph: ir.Graph, ids: ir.Value) -> None:
    """Types are all the first one; without offsets (BERT's own, not RoBERTa's) positions count from 0."""
    tables = graph.initializers
    types = next((value for name, value in tables.items() if name.endswith("token_type_embeddings.weight")), None)
    positions = next((value for name, value in tables.items() if name.endswith("embeddings.position_ids")), None)
    table = next((value for name, value in tables.items() if name.endswith("position_embeddings.weight")), None)
    if types is None or positions is None or table is None:
        return
    counted = _array(positions)
    if not np.array_equal(counted.reshape(-1), np.arange(counted.size)):
        return
    by_type, by_position = _only_user(types, "Gather"), _only_user(table, "Gather")
    first, second = _only_user(by_type.outputs[0], "Add"), _only_user(by_position.outputs[0], "Add")
    if second.inputs[0] is not first.outputs[0] or first.inputs[1] is not by_type.outputs[0]:
        raise ToolchainError(f"the embeddings are added in another order than expected. {_REMEDY}")
    table.const_value = ir.tensor(_array(table) + _array(types)[0], name=table.name)
    zero, tokens = _constant(graph, "first", [0]), _put(first, "Shape", [ids], start=1, end=2)
    rows = _put(first, "Slice", [table, zero, tokens, zero])
    second.replace_input_with(0, first.inputs[0])
    second.replace_input_with(1, rows)


def _shorten_mean(graph: ir.Graph, mask: ir.Value) -> None:
    output = graph.outputs[0]
    last = output.producer()
    sums = [node for node in graph if node.op_type == "ReduceSum"]
    weighted = sums[0].inputs[0].producer() if sums and sums[0].inputs[0] is not None else None
    if last is None or last.op_type != "Div" or len(sums) != 2 or weighted is None or weighted.op_type != "Mul":
        raise ToolchainError(f"the mean over tokens has another form than expected. {_REMEDY}")
    states = weighted.inputs[0]
    axis = _constant(graph, "middle", [1])
    weights = _put(last, "Cast", [mask], to=ir.DataType.FLOAT)
    rows = _put(last, "Unsqueeze", [weights, axis])
    total = _put(last, "Squeeze", [_put(last, "MatMul", [rows, states]), axis])
    unit = _put(last, "LpNormalization", [total], axis=-1, p=2)
    unit.name, unit.shape, unit.type = output.name, output.shape, output.type
    output.name = f"{unit.name}.before"
    graph.outputs[0] = unit


def _put(before: ir.Node, operator: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Value:
    """The output of a new node."""
    node = ir.node(operator, inputs, attributes=attributes)
    before.prepend(node)
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    array = np.array(values, dtype=np.int64)
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType.INT64))
    value.shape = ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def _array(value: ir.Value) -> Any:
    if value.const_value is None:
        raise ToolchainError(f"{value.name} has no values in the graph. {_REMEDY}")
    return value.const_value.numpy()


def _only_user(value: ir.Value, operator: str) -> ir.Node:
    users = list(value.consumers())
    if len(users) != 1 or users[0].op_type != operator:
        found = [user.op_type for user in users]
        raise ToolchainError(f"{value.name} goes to {found}, one {operator} expected. {_REMEDY}")
    return users[0]


def shorten_int8(model: onnx.ModelProto) -> int:
    """Rewrite a graph with products quantised at run time.

    Queries, keys and values become one product within attention (``QAttention``), and a bias before a GELU goes into
    the product before it, where it costs nothing. Attention that is not of this form is left as it is.

    Returns:
        How many products attention took in.
    """
    graph = model.graph
    maker = {output: node for node in graph.node for output in node.output}
    values = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    taken: set[str] = set()
    for node in graph.node:
        if node.op_type == "BiasGelu" and maker[node.input[0]].op_type == "DynamicQuantizeMatMul":
            product = maker[node.input[0]]
            bias = node.input[1]
            product.input[:] = [*product.input[:4], bias]
            node = helper.make_node("Gelu", node.input[:1], node.output, domain=_FUSED)
        elif node.op_type == "MultiHeadAttention":
            products = [maker[name] for name in node.input[:3]]
            if _same_input(products) and not any(node.input[5:]):
                taken.update(product.output[0] for product in products)
                node = _attention(node, products, values, graph)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.output[0] not in taken)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return len(taken)


def _same_input(products: list[onnx.NodeProto]) -> bool:
    """Quantised products with a bias, of one and the same tensor."""
    return all(p.op_type == "MatMulIntegerToFloat" and len(p.input) == 7 for p in products) and all(
        p.input[place] == products[0].input[place] for p in products for place in (0, 2, 4)
    )


def _attention(
    node: onnx.NodeProto, products: list[onnx.NodeProto], values: dict[str, onnx.TensorProto], graph: onnx.GraphProto
) -> onnx.NodeProto:
    joined = {}
    for what, place in (("weight", 1), ("scale", 3), ("zero_point", 5), ("bias", 6)):
        arrays = [numpy_helper.to_array(values[product.input[place]]) for product in products]
        joined[what] = f"{products[0].input[6]}{JOINED}.{what}"
        graph.initializer.append(numpy_helper.from_array(np.concatenate(arrays, axis=-1), joined[what]))
    states, scale, zero_point = (products[0].input[place] for place in (0, 2, 4))
    inputs = [states, joined["weight"], joined["bias"], scale, joined["scale"], node.input[4], zero_point]
    heads = next(attribute.i for attribute in node.attribute if attribute.name == "num_heads")
    return helper.make_node("QAttention", [*inputs, joined["zero_point"]], node.output, domain=_FUSED, num_heads=heads)
