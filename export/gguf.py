"""GGUF files: the header, tensors one at a time, and the network that they hold.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing in a file
is trusted: every count is held against the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import no_init_weights

from export.backbones import Backbone
from export.errors import CheckpointError
from export.nomic import NomicBert, NomicBertConfig

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_ENTRIES = 1 << 16  # metadata keys, and tensors: real files have hundreds
_MOST_ITEMS = 1 << 24  # of one array: the largest vocabularies have some hundred thousand tokens
_COPY_AGAIN = "Copy or download the file again."
_NUMBERS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
# What the gguf package turns back into floats and this module's tests have seen.
_TYPES = {
    GGMLQuantizationType[name]
    for name in "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the file: its shape as torch has it (outermost axis first), type and place."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # in the file
    bytes: int


class GgufFile:
    """An opened GGUF file. The header is read at once; a tensor when it is asked for, until it is closed.

    Metadata are read by their kind (``text``, ``flag``, ``whole`` ...), which raise CheckpointError where
    the file has a value of another kind.

    Attributes:
        path: The file.
        metadata: Values by key; arrays of numbers as numpy arrays, of strings as lists.
        tensors: By name, in the file's order.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: The file is missing, cut short, no GGUF, of another version, or its
                header contradicts itself.
        """
        self.path = path
        try:
            with path.open("rb") as stream:
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CheckpointError(f"{path}: is empty. {_COPY_AGAIN}") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error}). Give a GGUF file.") from None
        cursor = _Cursor(self._data, path)
        if cursor.take(4) != _MAGIC:
            raise CheckpointError(f"{path}: does not begin as a GGUF file does. Give a GGUF file, or a folder.")
        version = cursor.number("I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{path}: GGUF version {version} (or another byte order) is not supported, only "
                f"{' and '.join(map(str, _VERSIONS))}. Convert the model with a newer llama.cpp."
            )
        tensors, keys = cursor.count("tensors", _MOST_ENTRIES), cursor.count("metadata keys", _MOST_ENTRIES)
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = cursor.string()
            if key in self.metadata:
                raise cursor.broken(f"the key {key!r} occurs twice")
            self.metadata[key] = cursor.value()
        entries = [self._entry(cursor) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise cursor.broken(f"general.alignment is {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        self.tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset in entries:
            if name in self.tensors:
                raise cursor.broken(f"the tensor {name!r} occurs twice")
            size = self._size(cursor, name, shape, kind)
            if offset % alignment or start + offset + size > len(self._data):
                raise CheckpointError(
                    f"{path}: the tensor {name!r} ends at byte {start + offset + size} of {len(self._data)}: the file "
                    f"was cut short or its header is damaged. {_COPY_AGAIN}"
                )
            self.tensors[name] = Tensor(name, shape, kind, start + offset, size)

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BufferError):  # an exception on its way may hold a view; it goes with it
            self._data.close()

    @property
    def architecture(self) -> str:
        """Value of ``general.architecture``, or an empty string."""
        return self.text("general.architecture")

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._unfit(key, value, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self._unfit(key, value, "true or false")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0; without a default the key is needed."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._unfit(key, value, "a whole number above 0")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; without a default the key is needed."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self._unfit(key, value, "a number above 0")
        return float(value)

    def texts(self, key: str) -> list[str]:
        """An array of strings; empty where the key is absent."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list):
            raise self._unfit(key, value, "an array of texts")
        return value

    def numbers(self, key: str) -> NDArray[Any] | None:
        """An array of numbers; None where the key is absent."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise self._unfit(key, value, "an array of numbers")
        return value

    def token(self, key: str, count: int) -> int | None:
        """An id of one of ``count`` tokens; None where the key is absent."""
        value = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count):
            raise self._unfit(f"tokenizer.ggml.{key}_token_id", value, f"the id of one of {count} tokens")
        return value

    def _unfit(self, key: str, value: object, wanted: str) -> CheckpointError:
        shown = "missing" if value is None else repr(value)[:60]
        return CheckpointError(f"{self.path}: {key} is {shown}, not {wanted}. {_COPY_AGAIN}")

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32, dequantised by the ``gguf`` package.

        Raises:
            CheckpointError: There is none of this name, or it holds values that are not finite.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.path}: has no tensor {name!r}, which the architecture {self.architecture!r} needs. Give a file "
                "with the whole model; a split one has to be merged first (llama-gguf-split --merge)."
            )
        raw = np.frombuffer(self._data, np.uint8, tensor.bytes, tensor.offset)
        values: NDArray[np.float32]
        if tensor.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            kind = np.float32 if tensor.type == GGMLQuantizationType.F32 else np.float16
            values = raw.view(kind).astype(np.float32).reshape(tensor.shape)
        else:
            rows = raw.reshape(*tensor.shape[:-1], -1)
            values = gguf.quants.dequantize(rows, tensor.type).reshape(tensor.shape)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: the tensor {name!r} holds values that are not finite. {_COPY_AGAIN}")
        return values

    def _entry(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = cursor.string()
        rank = cursor.number("I")
        if not 1 <= rank <= 4:
            raise cursor.broken(f"the tensor {name!r} has {rank} axes")
        shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
        code = cursor.number("I")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise CheckpointError(
                f"{self.path}: the tensor {name!r} is of the unknown type {code}. {_supported_types()}"
            ) from None
        return name, shape, kind, cursor.number("Q")

    def _size(self, cursor: _Cursor, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
        if kind not in _TYPES:
            raise CheckpointError(f"{self.path}: the tensor {name!r} is of type {kind.name}. {_supported_types()}")
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not all(shape) or math.prod(shape) > 1 << 40 or shape[-1] % block:
            raise cursor.broken(f"the tensor {name!r} of type {kind.name} has the shape {shape}")
        return math.prod(shape) // block * size


def _supported_types() -> str:
    return f"Convert the model to one of {', '.join(sorted(kind.name for kind in _TYPES))} with llama-quantize."


class _Cursor:
    """A place in the file that never goes past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path = data, path
        self.position = 0

    def broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: the header is damaged: {what}. {_COPY_AGAIN}")

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self.position:
            raise self.broken(f"it ends at byte {len(self._data)}, within a value")
        start, self.position = self.position, self.position + size
        return self._data[start : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str, most: int) -> int:
        count = int(self.number("Q"))
        if count > most:
            raise self.broken(f"it announces {count} {what}")
        return count

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken(f"a string before byte {self.position} is not UTF-8") from None

    def value(self) -> Any:
        kind = self._kind()
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.number(_NUMBERS[kind])
        kind = self._kind()
        count = self.count("items of an array", _MOST_ITEMS)
        if kind == GGUFValueType.STRING:
            if count * 8 > len(self._data) - self.position:
                raise self.broken(f"it announces {count} strings, more than the file can hold")
            return [self.string() for _ in range(count)]
        if kind == GGUFValueType.ARRAY:
            raise self.broken("it has an array of arrays")
        item = np.dtype("<" + _NUMBERS[kind])
        return np.frombuffer(self.take(count * item.itemsize), item)

    def _kind(self) -> GGUFValueType:
        code = self.number("I")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self.broken(f"a value is of the unknown type {code}") from None


def summary(file: GgufFile) -> dict[str, Any]:
    """What ``ruvltra-export inspect`` shows, ready for JSON.

    Raises:
        CheckpointError: A value is of another kind than its key says.
    """
    own = f"{file.architecture}."
    sizes = {key.removeprefix(own): value for key, value in file.metadata.items() if key.startswith(own)}
    types: dict[str, int] = {}
    for tensor in file.tensors.values():
        types[tensor.type.name] = types.get(tensor.type.name, 0) + 1
    return {
        "file": str(file.path),
        "name": file.text("general.name"),
        "licence": file.text("general.license"),
        "architecture": file.architecture,
        "supported": file.architecture in ARCHITECTURES,
        "parameters": sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        "bytes": sum(tensor.bytes for tensor in file.tensors.values()),
        "sizes": {key: value for key, value in sizes.items() if isinstance(value, (int, float, str))},
        "types": types,
        "tokenizer": {
            "model": file.text("tokenizer.ggml.model", "none"),
            "pre": file.text("tokenizer.ggml.pre", "none"),
            "tokens": len(file.texts("tokenizer.ggml.tokens")),
            "merges": len(file.texts("tokenizer.ggml.merges")),
        },
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.type.name, "bytes": t.bytes}
            for t in file.tensors.values()
        ],
    }


# Names in the file (without ".weight" and ".bias") and in the network; N is the layer's number.
_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}
_BERT = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "blk.N.attn_q": "encoder.layer.N.attention.self.query",
    "blk.N.attn_k": "encoder.layer.N.attention.self.key",
    "blk.N.attn_v": "encoder.layer.N.attention.self.value",
    "blk.N.attn_output": "encoder.layer.N.attention.output.dense",
    "blk.N.attn_output_norm": "encoder.layer.N.attention.output.LayerNorm",
    "blk.N.ffn_up": "encoder.layer.N.intermediate.dense",
    "blk.N.ffn_down": "encoder.layer.N.output.dense",
    "blk.N.layer_output_norm": "encoder.layer.N.output.LayerNorm",
}
_NOMIC = {
    "token_embd": "word_embeddings",
    "token_types": "token_type_embeddings",
    "token_embd_norm": "norm",
    "blk.N.attn_qkv": "layers.N.qkv",
    "blk.N.attn_output": "layers.N.attention_output",
    "blk.N.attn_output_norm": "layers.N.attention_norm",
    "blk.N.ffn_up": "layers.N.up",
    "blk.N.ffn_gate": "layers.N.gate",
    "blk.N.ffn_down": "layers.N.down",
    "blk.N.layer_output_norm": "layers.N.output_norm",
}
_NAMES = {"llama": _DECODER, "qwen2": _DECODER, "bert": _BERT, "nomic-bert": _NOMIC}
ARCHITECTURES = tuple(_NAMES)
# What the frequencies of a scaled rotary embedding are divided by; no weights of the network.
_ROPE_FACTORS = "rope_freqs.weight"


def load_network(file: GgufFile, progress: str = "") -> Backbone:
    """The network that the file holds, in fp32: a causal language model or a bare encoder.

    Tensors are dequantised one at a time and handed over without a copy, so that the peak is one fp32
    copy of the network and the largest tensor. ``progress`` is what a progress bar says.

    Raises:
        CheckpointError: The architecture is not supported, or tensors and metadata disagree.
    """
    if file.architecture not in _NAMES:
        raise CheckpointError(
            f"{file.path}: the architecture {file.architecture!r} is not supported, only {', '.join(ARCHITECTURES)}. "
            "Export the model's Hugging Face folder instead."
        )
    names = _NAMES[file.architecture]
    network = _empty_network(file)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    state: dict[str, torch.Tensor] = {}
    for name in tqdm(file.tensors, desc=progress, disable=not progress, unit="tensor"):
        if name == _ROPE_FACTORS:
            continue
        target = _target(name, names)
        if target is None or target not in shapes:
            raise CheckpointError(
                f"{file.path}: the tensor {name!r} has no place in the architecture {file.architecture!r} as this "
                "version knows it. Export the model's Hugging Face folder instead."
            )
        values = file.read(name)
        if values.shape != shapes[target]:
            raise CheckpointError(
                f"{file.path}: the tensor {name!r} has the shape {values.shape}, but the metadata want "
                f"{shapes[target]}. {_COPY_AGAIN}"
            )
        if file.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = network.config.num_attention_heads if ".attn_q." in name else network.config.num_key_value_heads
            values = _unpermute(values, heads)
        state[target] = torch.from_numpy(values)
    if "lm_head.weight" in shapes and "lm_head.weight" not in state and network.config.tie_word_embeddings:
        state["lm_head.weight"] = state.get("model.embed_tokens.weight", torch.empty(0))
    missing = sorted(set(shapes) - set(state))
    if missing:
        raise CheckpointError(
            f"{file.path}: lacks the tensors of {', '.join(missing[:3])} ({len(missing)} in all). Give a file with the "
            "whole model; a split one has to be merged first (llama-gguf-split --merge)."
        )
    network.load_state_dict(state, assign=True)
    return network.eval()


def pooling_of(file: GgufFile) -> str | None:
    """The pooling that the file states: ``mean``, ``cls`` or ``lasttoken``; None if it states none.

    Raises:
        CheckpointError: It states one that gives no embeddings (a reranker's, for example).
    """
    value = file.metadata.get(f"{file.architecture}.pooling_type")
    if value is None or (isinstance(value, int) and value == 0):
        return None
    pooling = {1: "mean", 2: "cls", 3: "lasttoken"}.get(value) if isinstance(value, int) else None
    if pooling is None:
        raise CheckpointError(f"{file.path}: pooling type {value!r} gives no embeddings. Give an embedding model.")
    return pooling


def _target(name: str, names: Mapping[str, str]) -> str | None:
    """Name of a parameter in the network, or None if the architecture has none of this name."""
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".")
    layer = parts[1] if parts[0] == "blk" and len(parts) == 3 and parts[1].isdecimal() else None
    pattern = stem if layer is None else f"blk.N.{parts[2]}"
    target = names.get(pattern)
    if target is None or kind not in ("weight", "bias"):
        return None
    return f"{target.replace('.N.', f'.{layer}.')}.{kind}"


def _unpermute(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo what llama.cpp does to rows of query and key, whose rotary embedding pairs neighbours."""
    split = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


class _Sizes:
    """The architecture's numbers, held against the tensors before a network is made of them."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.layers = self.whole("block_count")
        self.hidden = self.whole("embedding_length")
        self.inner = self.whole("feed_forward_length")
        self.heads = self.whole("attention.head_count")
        self.positions = self.whole("context_length")
        self.kv_heads = self.whole("attention.head_count_kv", self.heads)
        self.head_dim = self.whole("attention.key_length", max(1, self.hidden // self.heads))
        embedding, up = file.tensors.get("token_embd.weight"), file.tensors.get("blk.0.ffn_up.weight")
        if embedding is None or up is None or len(embedding.shape) != 2:
            raise CheckpointError(f"{file.path}: lacks token_embd.weight or blk.0.ffn_up.weight. {_COPY_AGAIN}")
        self.vocabulary = embedding.shape[0]
        found = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
        stated = {
            "block_count": (self.layers, len(found)),
            "embedding_length": (self.hidden, embedding.shape[1]),
            "feed_forward_length": (self.inner, up.shape[0]),
        }
        places = file.tensors.get("position_embd.weight")
        if places is not None:
            stated["context_length"] = (self.positions, places.shape[0])
        for key, (said, seen) in stated.items():
            if said != seen:
                raise CheckpointError(
                    f"{file.path}: {file.architecture}.{key} is {said}, but the tensors say {seen}. {_COPY_AGAIN}"
                )
        for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            matrix = file.tensors.get(f"blk.0.attn_{part}.weight")  # absent where the three are one
            if matrix is not None and matrix.shape[0] != heads * self.head_dim:
                raise CheckpointError(
                    f"{file.path}: {heads} heads of {self.head_dim} values do not fit the {matrix.shape[0]} rows of "
                    f"{matrix.name}. {_COPY_AGAIN}"
                )
        if self.heads % self.kv_heads or self.hidden % self.heads:
            raise CheckpointError(
                f"{file.path}: {self.heads} heads do not divide {self.hidden} values, or are no multiple of the "
                f"{self.kv_heads} of keys. {_COPY_AGAIN}"
            )
        if not 1 <= self.positions <= 1 << 24:
            raise CheckpointError(f"{file.path}: a context of {self.positions} tokens is absurd. {_COPY_AGAIN}")

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0 of the architecture's own."""
        return self._file.whole(f"{self._file.architecture}.{key}", default)

    def real(self, key: str, default: float | None = None) -> float:
        """A number above 0 of the architecture's own."""
        return self._file.real(f"{self._file.architecture}.{key}", default)


def _check_rotary(file: GgufFile, head_dim: int) -> None:
    """Raise CheckpointError for kinds of rotary embedding that the networks here do not have."""
    own = f"{file.architecture}.rope."
    turned = file.whole(f"{own}dimension_count", head_dim)
    kind, linear = file.text(f"{own}scaling.type", "none"), file.real(f"{own}scale_linear", 1.0)
    if turned != head_dim or kind != "none" or linear != 1:
        raise CheckpointError(
            f"{file.path}: rotary embeddings of {turned} among {head_dim} values, scaled by {kind!r} and {linear}, are "
            "not supported for GGUF files, only unscaled ones of all values. Export the model's Hugging Face folder "
            "instead."
        )


def _rope_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """What transformers calls the scaling that the file holds as factors; None where it holds none.

    Llama 3's is the one that occurs (Llama 3.1 model card): low frequencies are divided by the
    largest factor, and the rest is known.

    Raises:
        CheckpointError: The factors are of another kind.
    """
    if _ROPE_FACTORS not in file.tensors:
        return None
    factors = file.read(_ROPE_FACTORS)
    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaling = {"rope_type": "llama3", "factor": float(factors.max(initial=1.0)), **known}
    config = LlamaConfig(  # type: ignore[no-untyped-call]
        head_dim=head_dim, rope_theta=theta, max_position_embeddings=1 << 17, rope_scaling=scaling
    )
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    expected = plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].numpy()
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{file.path}: the factors in {_ROPE_FACTORS} are not those of Llama 3. Export the model's Hugging Face "
            "folder instead."
        )
    return scaling


def _empty_network(file: GgufFile) -> Backbone:
    """The network without weights: its memory is not touched before they are put in its place."""
    sizes = _Sizes(file)
    if file.architecture in ("llama", "qwen2"):
        return _decoder(file, sizes)
    common: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.positions,
    }
    eps = sizes.real("attention.layer_norm_epsilon")
    if file.architecture == "nomic-bert":
        _check_rotary(file, sizes.head_dim)
        theta = sizes.real("rope.freq_base", 10000.0)
        with no_init_weights():
            return NomicBert(NomicBertConfig(**common, layer_norm_eps=eps, rope_theta=theta))
    types = file.tensors.get("token_types.weight")
    config = BertConfig(  # type: ignore[no-untyped-call]
        **common,
        layer_norm_eps=eps,
        type_vocab_size=2 if types is None else types.shape[0],
        attn_implementation="eager",
    )
    with no_init_weights():
        return BertModel(config, add_pooling_layer=False)  # type: ignore[no-untyped-call]


def _decoder(file: GgufFile, sizes: _Sizes) -> Backbone:
    """A causal language model without weights."""
    if not file.flag(f"{file.architecture}.attention.causal", True):
        raise CheckpointError(
            f"{file.path}: attention in both directions is not supported for {file.architecture}. Export the model's "
            "Hugging Face folder instead."
        )
    _check_rotary(file, sizes.head_dim)
    theta = sizes.real("rope.freq_base", 10000.0)
    values: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.positions,
        "rms_norm_eps": sizes.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, theta, sizes.head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.token("bos", sizes.vocabulary),
        "eos_token_id": file.token("eos", sizes.vocabulary),
        "attn_implementation": "eager",
    }
    with no_init_weights():
        if file.architecture == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**values))  # type: ignore[no-untyped-call]
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        return LlamaForCausalLM(LlamaConfig(**values))  # type: ignore[no-untyped-call]
