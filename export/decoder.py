"""Graphs of Llama- and Qwen2-like decoders, put together operator by operator.

torch's exporter leaves such a network in pieces that ONNX Runtime cannot fuse again, so that its own operators are
written here: GroupQueryAttention with the rotary embedding inside, SkipSimplifiedLayerNormalization, one product for
queries, keys and values. The embedding graph has the inputs and output of every encoder; the generating one is made of
it, quantised or not, and shares its file of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge.decoder import Sizes
from export.errors import ToolchainError
from export.onnx import INPUTS, OPSET, OUTPUT, weights_path
from export.wrapper import SentenceEncoder

LONGEST = 32768  # tokens that the graphs have positions for
_MICROSOFT = "com.microsoft"
_POOLING = ("mean", "lasttoken")
_INLINE = 1024  # bytes from which a tensor goes to the file of weights
_BLOCKS = (128, 64, 32, 16)  # values that share a scale, the most that divide a row


def is_decoder(model: SentenceEncoder) -> bool:
    """Whether :func:`export_decoder` can write it."""
    config = model.backbone.config
    return (
        config.model_type in ("llama", "qwen2")
        and config.hidden_act == "silu"
        and model.pooling in [(mode,) for mode in _POOLING]
        and not len(model.dense)
    )


def export_decoder(model: SentenceEncoder, path: Path) -> None:
    """Write the embedding graph in fp32, weights beside it.

    Inputs and output are those of :func:`export.onnx.export_fp32`. Padding is at the end, where no token sees it; a
    mask over the keys would take memory by the square of a text's length, which ONNX Runtime's attention by itself
    does not. A text that is padded on the left becomes zeros, which is no unit vector.
    """
    weights_path(path).unlink(missing_ok=True)
    graph = _Graph(model, _Weights(weights_path(path)))
    graph.attend_without_cache()
    hidden = graph.layers()
    graph.pool(hidden, model.pooling[0])
    graph.save(path)


class _Weights:
    """Tensors of a graph. Large ones go to its file of weights at once: there are gigabytes of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: list[onnx.TensorProto] = []

    def add(self, name: str, values: NDArray[Any]) -> str:
        if values.nbytes < _INLINE:
            self.tensors.append(numpy_helper.from_array(np.array(values, order="C"), name))
            return name
        with self.path.open("ab") as stream:
            stream.write(b"\0" * (-stream.tell() % 4096))  # so that it can be mapped
            offset = stream.tell()
            stream.write(np.ascontiguousarray(values).data)
        tensor = onnx.TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
        self._place(tensor, self.path.name, offset, values.nbytes)
        return name

    def _place(self, tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        self.tensors.append(tensor)


class _Graph:
    """A graph under construction; nodes are named after what they compute."""

    def __init__(self, model: SentenceEncoder, weights: _Weights) -> None:
        self.backbone = model.backbone
        self.config = model.backbone.config
        self.width = int(self.config.hidden_size)
        self._nodes: list[onnx.NodeProto] = []
        self._weights = weights
        self._attention: list[str] = []  # GroupQueryAttention's inputs after the packed queries, keys and values

    def node(self, operator: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        domain = _MICROSOFT if operator in _CONTRIBUTED else ""
        names = [name, *(f"{name}/{i}" for i in range(1, outputs))]
        self._nodes.append(helper.make_node(operator, inputs, names, name=name, domain=domain, **attributes))
        return name

    def weight(self, name: str, values: torch.Tensor | NDArray[Any]) -> str:
        array = values.detach().float().numpy() if isinstance(values, torch.Tensor) else values
        return self._weights.add(name, array)

    def product(self, value: str, name: str, layers: Sequence[Any]) -> str:
        """Linear layers side by side, as one product."""
        weight = torch.cat([layer.weight for layer in layers])
        done = self.node("MatMul", [value, self.weight(f"{name}.weight", weight.T)], name)
        if layers[0].bias is None:
            return done
        bias = torch.cat([layer.bias for layer in layers])
        return self.node("Add", [done, self.weight(f"{name}.bias", bias)], f"{name}.biased")

    def attend_without_cache(self) -> None:
        """What attention is told of the texts: their length, and rotations."""
        self.node("Shape", [INPUTS[0]], "shape")
        self.node("Gather", ["shape", self.weight("one", np.array(1, np.int64))], "tokens", axis=0)
        self.node("Gather", ["shape", self.weight("zero", np.array(0, np.int64))], "batch", axis=0)
        self.node("Cast", ["tokens"], "total", to=TensorProto.INT32)
        self.node("Sub", ["total", self.weight("one.int32", np.array(1, np.int32))], "last")
        self.node("Unsqueeze", ["batch", self.weight("axis.0", np.array([0]))], "batch.row")
        self.node("Expand", ["last", "batch.row"], "lasts")
        cos, sin = self._rotations()
        self._attention = ["", "", "", "", "lasts", "total", cos, sin]

    def _rotations(self) -> tuple[str, str]:
        longest = min(int(self.config.max_position_embeddings), LONGEST)
        with torch.no_grad():
            cos, sin = self.backbone.rotary_emb(torch.zeros(1, 1, self.width), torch.arange(longest)[None])
        half = cos.shape[-1] // 2
        return self.weight("cos", cos[0, :, :half]), self.weight("sin", sin[0, :, :half])

    def layers(self) -> str:
        """From ids to the last hidden states, (batch, tokens, width)."""
        epsilon = float(self.config.rms_norm_eps)
        table = self.weight("table", self.backbone.embed_tokens.weight)
        state = self.node("Gather", [table, INPUTS[0]], "embedded", axis=0)
        added = ""
        for i, layer in enumerate(self.backbone.layers):
            name = f"layer.{i}"
            scale = self.weight(f"{name}.norm.weight", layer.input_layernorm.weight)
            if not added:
                normed = self.node(
                    "SimplifiedLayerNormalization",
                    [state, scale],
                    f"{name}.norm",
                    axis=-1,
                    epsilon=epsilon,
                    stash_type=1,
                )
            else:
                normed = self._skip_norm(state, added, scale, f"{name}.norm", epsilon)
                state = f"{normed}/3"
            attention = layer.self_attn
            packed = self.product(normed, f"{name}.qkv", (attention.q_proj, attention.k_proj, attention.v_proj))
            attended = self.node(
                "GroupQueryAttention",
                [packed, *self._attention],
                f"{name}.attention",
                3,
                num_heads=int(self.config.num_attention_heads),
                kv_num_heads=int(self.config.num_key_value_heads),
                do_rotary=1,
                rotary_interleaved=0,
            )
            added = self.product(attended, f"{name}.output", (attention.o_proj,))
            scale = self.weight(f"{name}.second_norm.weight", layer.post_attention_layernorm.weight)
            normed = self._skip_norm(state, added, scale, f"{name}.second_norm", epsilon)
            state = f"{normed}/3"
            gate = self.product(normed, f"{name}.gate", (layer.mlp.gate_proj,))
            inner = self.product(normed, f"{name}.up", (layer.mlp.up_proj,))
            opened = self.node("Mul", [gate, self.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
            inner = self.node("Mul", [opened, inner], f"{name}.inner")
            added = self.product(inner, f"{name}.down", (layer.mlp.down_proj,))
        return self._skip_norm(state, added, self.weight("norm.weight", self.backbone.norm.weight), STATES, epsilon)

    def _skip_norm(self, state: str, added: str, scale: str, name: str, epsilon: float) -> str:
        """The norm of a sum; the sum itself is output 3."""
        return self.node("SkipSimplifiedLayerNormalization", [state, added, scale], name, 4, epsilon=epsilon)

    def pool(self, hidden: str, mode: str) -> None:
        """Unit vectors, as the output."""
        if mode == "mean":
            self.node("Cast", [INPUTS[1]], "mask.float", to=TensorProto.FLOAT)
            self.node("Unsqueeze", ["mask.float", self.weight("axis.2", np.array([2]))], "mask.column")
            self.node("Mul", [hidden, "mask.column"], "counted")
            vector = self.node("ReduceSum", ["counted", self.weight("axis.1", np.array([1]))], "pooled", keepdims=0)
        else:  # the first place where all tokens are counted
            self.node("CumSum", [INPUTS[1], self.weight("axis.of.tokens", np.array(1, np.int64))], "counts")
            self.node("ArgMax", ["counts"], "place", axis=1, keepdims=1)
            vector = self.node("GatherND", [hidden, "place"], "pooled", batch_dims=1)
        # A text that does not begin with its first token is padded on the left: it comes out as zeros, not as nonsense.
        self.node("Gather", [INPUTS[1], self.weight("first.place", np.array([0]))], "first", axis=1)
        self.node("Cast", ["first"], "first.float", to=TensorProto.FLOAT)
        vector = self.node("Mul", [vector, "first.float"], "begun")
        self.node("ReduceL2", [vector, self.weight("axis.last", np.array([-1]))], "length", keepdims=1)
        self.node("Max", ["length", self.weight("tiny", np.array(1e-12, np.float32))], "length.least")
        self.node("Div", [vector, "length.least"], OUTPUT)

    def save(self, path: Path) -> None:
        ids, mask = (helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in INPUTS)
        output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", self.width])
        graph = helper.make_graph(self._nodes, "embedding", [ids, mask], [output], self._weights.tensors)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MICROSOFT, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


STATES = "states"  # the last hidden states, in the embedding graph
_CONTRIBUTED = {"GroupQueryAttention", "SkipSimplifiedLayerNormalization", "MatMulNBits", "GatherBlockQuantized"}


def sizes_of(language_model: Any) -> Sizes:
    """Of the keys and values of a network."""
    config = language_model.config
    values = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Sizes(int(config.num_hidden_layers), int(config.num_key_value_heads), int(values))


def write_generator(source: Path, target: Path, language_model: Any) -> None:
    """Write the generating graph that belongs to an embedding graph; both share the latter's file of weights.

    Inputs, for one text: ``input_ids`` and ``position_ids`` (1, tokens) int64; ``attention_bias`` (1, 1, tokens, total)
    float32, added to the attention's logits; ``total`` () int32, the tokens with those of the cache, and ``lengths``
    (1,) int32, one less; ``rows`` (rows,) int64, of which tokens the logits are wanted; for each layer ``past.N.key``
    and ``past.N.value`` float32. Outputs: ``logits`` (rows, vocabulary) and ``present.N.key`` and ``.value``. With a
    cache of at least one token ``position_ids`` may be any, so that several continuations can be run at once, each
    seeing its own tokens alone.

    Args:
        source: An embedding graph that :func:`export_decoder` wrote, or its weight-only quantisation.
        target: Where to write; into the same folder.
        language_model: The network around the decoder, for its output layer.

    Raises:
        ToolchainError: The graph is not as it was written.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    sizes = sizes_of(language_model)
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if len(attentions) != sizes.layers:
        raise ToolchainError(f"{source.name}: {len(attentions)} of {sizes.layers} layers attend. Export it again.")
    for i, node in enumerate(attentions):
        packed, kept = node.input[0], list(node.input[7:9])
        del node.input[:], node.output[1:]
        past, present = ([f"{name}.{i}.key", f"{name}.{i}.value"] for name in ("past", "present"))
        node.input.extend([packed, "", "", *past, "lengths", "total", *kept, "position_ids", "attention_bias"])
        node.output.extend(present)
    given = {"input_ids", "position_ids", "attention_bias", "lengths", "total", "rows"}
    needed = _needed(graph, STATES, given)
    weights = _Appended(source, graph, {name for node in needed for name in node.input})
    head = [
        helper.make_node(
            "Reshape", [STATES, weights.add("rows.shape", np.array([-1, _width(language_model)]))], ["flat"]
        ),
        helper.make_node("Gather", ["flat", "rows"], ["chosen"], axis=0),
        _output_layer(graph, weights, language_model, source),
    ]
    tensor = helper.make_tensor_value_info
    inputs = [tensor(name, TensorProto.INT64, [1, "tokens"]) for name in ("input_ids", "position_ids")]
    inputs += [
        tensor("attention_bias", TensorProto.FLOAT, [1, 1, "tokens", "total_tokens"]),
        tensor("lengths", TensorProto.INT32, [1]),
        tensor("total", TensorProto.INT32, []),
        tensor("rows", TensorProto.INT64, ["rows"]),
    ]
    outputs = [
        tensor("logits", TensorProto.FLOAT, ["rows", int(language_model.config.vocab_size)]),
        tensor(STATES, TensorProto.FLOAT, [1, "tokens", _width(language_model)]),
    ]
    for i in range(sizes.layers):
        for kind in ("key", "value"):
            inputs.append(tensor(f"past.{i}.{kind}", TensorProto.FLOAT, [1, sizes.heads, "past", sizes.values]))
            outputs.append(tensor(f"present.{i}.{kind}", TensorProto.FLOAT, [1, sizes.heads, "room", sizes.values]))
    made = helper.make_graph([*needed, *head], "generator", inputs, outputs, weights.tensors)
    result = helper.make_model(made, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    onnx.save(result, target)


def _width(language_model: Any) -> int:
    return int(language_model.config.hidden_size)


def _needed(graph: onnx.GraphProto, wanted: str, given: set[str]) -> list[onnx.NodeProto]:
    """The nodes that a value is computed by, in their order."""
    maker = {output: node for node in graph.node for output in node.output}
    found: set[str] = set()
    open_ = [wanted]
    while open_:
        node = maker.get(open_.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            open_ += [name for name in node.input if name and name not in given]
    return [node for node in graph.node if node.name in found]


class _Appended(_Weights):
    """Initialisers of a graph that is there, and new ones."""

    def __init__(self, source: Path, graph: onnx.GraphProto, names: set[str]) -> None:
        super().__init__(weights_path(source))
        self.known = {tensor.name: tensor for tensor in graph.initializer}
        self.tensors = [tensor for tensor in graph.initializer if tensor.name in names]

    def shaped(self, name: str, alias: str, shape: Sequence[int]) -> str:
        """A known tensor's values in another shape, under another name."""
        known = self.known[name]
        tensor = onnx.TensorProto(name=alias, data_type=known.data_type, dims=shape)
        if known.external_data:
            entry = {item.key: item.value for item in known.external_data}
            self._place(tensor, entry["location"], int(entry["offset"]), int(entry["length"]))
        else:
            tensor.raw_data = known.raw_data
            self.tensors.append(tensor)
        return alias


def _output_layer(graph: onnx.GraphProto, weights: _Appended, language_model: Any, source: Path) -> onnx.NodeProto:
    """The product of the chosen states and the output layer, in the precision of the embedding's table."""
    vocabulary, width = int(language_model.config.vocab_size), _width(language_model)
    head = language_model.lm_head.weight.detach()
    tied = head is language_model.model.embed_tokens.weight or bool(language_model.config.tie_word_embeddings)
    lookup = next((node for node in graph.node if "input_ids" in node.input and node.op_type != "Shape"), None)
    if lookup is None or lookup.op_type not in ("Gather", "GatherBlockQuantized"):
        raise ToolchainError(f"{source.name}: its embedding table cannot be shared. Export it again.")
    if lookup.op_type == "Gather":
        table = lookup.input[0] if tied else weights.add("head", head.float().numpy())
        return helper.make_node("Gemm", ["chosen", table], ["logits"], name="logits", transB=1)
    names = [lookup.input[0], lookup.input[2], lookup.input[3]]
    block = next(item.i for item in lookup.attribute if item.name == "block_size")
    blocks = width // block
    if tied:
        shapes = [(vocabulary, blocks, block), (vocabulary, blocks), (vocabulary, blocks)]
        names = [
            weights.shaped(name, f"head.{i}", shape) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
        ]
    else:
        parts = quantise_rows(head.float().numpy(), block)
        names = [
            weights.add("head.0", parts[0].reshape(vocabulary, blocks, block)),
            weights.add("head.1", parts[1]),
            weights.add("head.2", parts[2]),
        ]
    return helper.make_node(
        "MatMulNBits",
        ["chosen", *names],
        ["logits"],
        name="logits",
        domain=_MICROSOFT,
        K=width,
        N=vocabulary,
        bits=8,
        block_size=block,
        accuracy_level=4,
    )


def quantise_rows(
    values: NDArray[np.float32], block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """8 bits in blocks along the rows, each with scale and zero point: what two of ONNX Runtime's operators read.

    Returns:
        (rows, width) uint8, (rows, blocks) float32 and (rows, blocks) uint8.
    """
    rows, width = values.shape
    data = np.empty((rows, width), np.uint8)
    scales = np.empty((rows, width // block), np.float32)
    zeros = np.empty((rows, width // block), np.uint8)
    for start in range(0, rows, 8192):  # a table has hundreds of millions of values
        part = values[start : start + 8192].reshape(-1, width // block, block)
        low, high = np.minimum(part.min(axis=2), 0), np.maximum(part.max(axis=2), 0)
        scale = np.maximum((high - low) / 255, 1e-12).astype(np.float32)
        zero = np.clip(np.rint(-low / scale), 0, 255)
        stepped = np.clip(np.rint(part / scale[..., None]) + zero[..., None], 0, 255)
        data[start : start + 8192] = stepped.reshape(-1, width)
        scales[start : start + 8192], zeros[start : start + 8192] = scale, zero
    return data, scales, zeros


def quantise_table(model: onnx.ModelProto) -> None:
    """Replace a decoder's embedding table by one of 8 bits in blocks, which its output layer can share."""
    graph = model.graph
    lookup = next(node for node in graph.node if node.op_type == "Gather" and node.input[1] == INPUTS[0])
    table = next(tensor for tensor in graph.initializer if tensor.name == lookup.input[0])
    values = numpy_helper.to_array(table)
    block = next((size for size in _BLOCKS if values.shape[1] % size == 0), None)
    if block is None:
        raise ToolchainError(f"an embedding of {values.shape[1]} values has no blocks. Leave the variant out.")
    names = [f"{table.name}.{part}" for part in ("data", "scales", "zeros")]
    parts: tuple[NDArray[Any], ...] = quantise_rows(values, block)
    tensors = [numpy_helper.from_array(part, name) for part, name in zip(parts, names, strict=True)]
    graph.initializer.remove(table)
    graph.initializer.extend(tensors)
    replacement = helper.make_node(
        "GatherBlockQuantized",
        [names[0], INPUTS[0], names[1], names[2]],
        list(lookup.output),
        name=lookup.name,
        domain=_MICROSOFT,
        bits=8,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    place = list(graph.node).index(lookup)
    graph.node.remove(lookup)
    graph.node.insert(place, replacement)
