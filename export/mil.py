"""Runs a saved ``.mlpackage`` without a Mac: its program and its weights are read and interpreted here.

Core ML predicts on macOS only. This evaluator follows the definitions of the MIL operations (coremltools'
reference, "MIL Ops") in numpy, and so shows what a package computes: that weights, axes, masks and
compression are right, and what half precision costs. It cannot show that Core ML accepts the package, where
an operation runs, or how a device rounds within one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from export.errors import ToolchainError
from export.onnx import quiet

Array: TypeAlias = NDArray[Any]
# How floats are held: all in float32, or each operation's result rounded to the type that the program
# declares for it, overflow to infinity included.
Mode: TypeAlias = Literal["float32", "declared"]
Arguments: TypeAlias = Mapping[str, Any]  # arrays, strings for those of type string, lists for ``values``


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a package: its type, and the shapes that it takes."""

    dtype: str
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What the program says of one result of an operation; None stands for a size that it leaves open."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that is no constant.

    Attributes:
        kind: As ``conv``.
        inputs: Names of values by parameter; a tuple for a parameter that takes several.
        results: One, or several for ``split``.
        valued: Whether it depends on what stands in an input, not on its shape alone.
    """

    kind: str
    inputs: Mapping[str, str | tuple[str, ...]]
    results: tuple[Result, ...]
    valued: bool


@dataclass(frozen=True, slots=True)
class Compressed:
    """A constant that is held compressed: by which operation, how many values, in how many bytes."""

    operation: str
    values: int
    bytes: int


Observer: TypeAlias = Callable[[Operation, Arguments, Sequence[Array]], None]


class MilProgram:
    """The program of a package, ready to run.

    Attributes:
        path: The package.
        spec: Its ``Model`` message, as coremltools.proto defines it.
        inputs: By name.
        outputs: Names.
        operations: In order, constants left out.
        compressed: The constants that are held compressed, by name.
    """

    def __init__(self, path: Path) -> None:
        """Read a package, its compressed constants taken apart.

        Raises:
            ToolchainError: It is not a whole package of an mlprogram, or has an operation that is not
                known here; the message names both.
        """
        self.path = path
        with quiet(f"reading {path.name}"):
            from coremltools.proto import MIL_pb2, Model_pb2

            self.spec = Model_pb2.Model.FromString(_model_file(path).read_bytes())
        if self.spec.WhichOneof("Type") != "mlProgram" or "main" not in self.spec.mlProgram.functions:
            raise ToolchainError(f"{path}: holds no mlprogram with a function 'main'. Convert the model again.")
        self._types: dict[int, str] = {number: name.lower() for name, number in MIL_pb2.DataType.items()}
        self._weights: dict[str, Array] = {}  # the files of weights
        self._constants: dict[str, Any] = {}
        self.compressed: dict[str, Compressed] = {}
        function = self.spec.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        self.inputs = {value.name: _input(path, value) for value in self.spec.description.input}
        self.outputs = tuple(block.outputs)
        self.operations: list[Operation] = []
        valued = set(self.inputs)
        for message in block.operations:
            if message.type == "const" or message.type.startswith("constexpr_"):
                self._add_constant(message)
                continue
            if message.type not in _OPERATIONS:
                raise ToolchainError(
                    f"{path}: the operation {message.type!r} is not known to the evaluator, so that the package cannot "
                    "be proven. Use the tested coremltools, or add the operation to export/mil.py."
                )
            operation = self._operation(message, valued)
            if operation.valued:
                valued.update(result.name for result in operation.results)
            self.operations.append(operation)

    def run(
        self, inputs: Mapping[str, Array], mode: Mode = "declared", observe: Observer | None = None
    ) -> dict[str, Array]:
        """Evaluate the program.

        Args:
            inputs: Arrays of the shapes that the package takes, by name.
            mode: How floats are held. Within an operation it is always float32.
            observe: Called after each operation with its arguments and results.

        Returns:
            The outputs by name, floats as float32.

        Raises:
            ToolchainError: An input is missing, not known or of a shape that the package does not take, or a
                result is not of the shape that the program declares.
        """
        self._check(inputs)
        values = dict(self._constants)
        for name, value in inputs.items():
            values[name] = _held(value, self.inputs[name].dtype, mode)
        for operation in self.operations:
            arguments = {
                parameter: values[name] if isinstance(name, str) else [values[one] for one in name]
                for parameter, name in operation.inputs.items()
            }
            with np.errstate(all="ignore"):  # overflow is a result like others here
                computed = _OPERATIONS[operation.kind](arguments)
                made = computed if isinstance(computed, list) else [computed]
                held = [_held(v, r.dtype, mode) for v, r in zip(made, operation.results, strict=True)]
            for result, value in zip(operation.results, held, strict=True):
                if not _fits(value, result.shape):
                    raise ToolchainError(
                        f"{self.path}: {operation.kind} {result.name!r} gives the shape {value.shape}, the program "
                        f"declares {result.shape}. Convert the model again."
                    )
                values[result.name] = value
            if observe is not None:
                observe(operation, arguments, held)
        return {name: values[name] for name in self.outputs}

    def _check(self, inputs: Mapping[str, Array]) -> None:
        if inputs.keys() != self.inputs.keys():
            raise ToolchainError(
                f"{self.path}: takes the inputs {sorted(self.inputs)}, got {sorted(inputs)}. Give exactly those."
            )
        for name, value in inputs.items():
            if value.shape not in self.inputs[name].shapes:
                raise ToolchainError(
                    f"{self.path}: {name} has the shape {value.shape}; the package takes {self.inputs[name].shapes}. "
                    "Pad the text to one of these."
                )

    def _operation(self, message: Any, valued: set[str]) -> Operation:
        inputs: dict[str, str | tuple[str, ...]] = {}
        names: list[str] = []
        for parameter, argument in message.inputs.items():
            bound = tuple(self._bound(binding) for binding in argument.arguments)
            names += bound
            inputs[parameter] = bound if parameter == "values" else bound[0]
        results = tuple(self._result(value) for value in message.outputs)
        return Operation(message.type, inputs, results, message.type != "shape" and not valued.isdisjoint(names))

    def _bound(self, binding: Any) -> str:
        """The name of a value that an operation is given; a literal is kept under a name of its own."""
        if binding.WhichOneof("binding") == "name":
            return str(binding.name)
        name = f" literal {len(self._constants)}"
        self._constants[name] = self._value(binding.value)
        return name

    def _result(self, value: Any) -> Result:
        tensor = value.type.tensorType
        shape = tuple(d.constant.size if d.HasField("constant") else None for d in tensor.dimensions)
        return Result(value.name, self._types[tensor.dataType], shape)

    def _add_constant(self, message: Any) -> None:
        values = {key: self._value(value) for key, value in message.attributes.items()}
        for parameter, argument in message.inputs.items():
            values[parameter] = self._constants[argument.arguments[0].name]
        result = self._result(message.outputs[0])
        if message.type == "const":
            value = values["val"]
        elif message.type in _COMPRESSED:
            value = _COMPRESSED[message.type](values)
            size = sum(parameter.nbytes for parameter in values.values() if not isinstance(parameter, str))
            self.compressed[result.name] = Compressed(message.type, value.size, size)
        else:
            raise ToolchainError(
                f"{self.path}: the compression {message.type!r} is not known to the evaluator. Use another one."
            )
        if not isinstance(value, str):
            value = _held(value, result.dtype, "declared")
            if not _fits(value, result.shape):
                raise ToolchainError(
                    f"{self.path}: the constant {result.name!r} has the shape {value.shape}, {result.shape} is "
                    "declared. Convert the model again."
                )
        self._constants[result.name] = value

    def _value(self, value: Any) -> Any:
        """An array, or a string."""
        tensor = value.type.tensorType
        dtype = self._types[tensor.dataType]
        shape = tuple(int(d.constant.size) for d in tensor.dimensions)
        if value.WhichOneof("value") == "blobFileValue":
            return self._blob(value.blobFileValue, dtype, shape)
        held = value.immediateValue.tensor
        kind = held.WhichOneof("value")
        if kind == "strings":
            return str(held.strings.values[0])
        if kind == "bytes":
            return np.frombuffer(held.bytes.values, _STORED[dtype][0]).reshape(shape)
        return np.array(getattr(held, kind).values, _STORED[dtype][0]).reshape(shape)

    def _blob(self, blob: Any, dtype: str, shape: tuple[int, ...]) -> Array:
        """An array of a file of weights.

        The file is of the storage format 2 of coremltools' MILBlob: at the stated offset lies a header of 64
        bytes, little-endian: 0xDEADBEEF, the type, the size in bytes and the offset of the data.
        """
        if blob.fileName not in self._weights:
            file = _model_file(self.path).parent / blob.fileName.removeprefix("@model_path/")
            if not file.is_file():
                raise ToolchainError(f"{self.path}: {file.name} is missing. Convert the model again.")
            self._weights[blob.fileName] = np.fromfile(file, np.uint8)
        data = self._weights[blob.fileName]
        stored, code = _STORED[dtype]
        size = int(np.prod(shape)) * np.dtype(stored).itemsize
        header = data[blob.offset : blob.offset + 64].tobytes()
        if len(header) == 64:
            sentinel, kind, length, offset = struct.unpack_from("<IIQQ", header)
            if (sentinel, kind, length) == (0xDEADBEEF, code, size) and offset + size <= len(data):
                values: Array = data[offset : offset + size].view(stored)
                return values.reshape(shape)
        raise ToolchainError(
            f"{self.path}: no weights of type {dtype} and shape {shape} at {blob.offset} of {blob.fileName}. Convert "
            "the model again."
        )


def _model_file(path: Path) -> Path:
    """The file of the root model, by the package's manifest."""
    try:
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        file = path / "Data" / str(item["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolchainError(
            f"{path}: not a package ({type(error).__name__}: {error}). Convert the model again."
        ) from None
    if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
        raise ToolchainError(f"{path}: has no model file {item['path']!r}. Convert the model again.")
    return file


def _input(path: Path, value: Any) -> Input:
    kind = value.type.multiArrayType
    flexible = kind.WhichOneof("ShapeFlexibility")
    if flexible == "shapeRange":
        raise ToolchainError(f"{path}: {value.name} takes a range of shapes. Enumerate them.")
    listed = [tuple(shape.shape) for shape in kind.enumeratedShapes.shapes] if flexible else [tuple(kind.shape)]
    name = kind.ArrayDataType.Name(kind.dataType).lower()
    return Input(name, tuple(sorted(tuple(map(int, shape)) for shape in listed)))


def _held(value: Any, dtype: str, mode: Mode) -> Array:
    """A value in the type that the evaluator holds a declared type in: floats always as float32."""
    array = np.asarray(value)
    if dtype == "float16" and mode == "declared":
        array = array.astype(np.float16)
    held: Array = array.astype(_HELD[dtype], copy=False)
    return held


def _fits(value: Array, shape: Sequence[int | None]) -> bool:
    return value.ndim == len(shape) and all(s is None or s == n for s, n in zip(shape, value.shape, strict=True))


# Types as files of weights and literals hold them, and their numbers in a weight file (None: not in one).
_STORED: dict[str, tuple[Any, int | None]] = {
    "float16": (np.float16, 1),
    "float32": (np.float32, 2),
    "uint8": (np.uint8, 3),
    "int8": (np.int8, 4),
    "int32": (np.int32, None),
    "uint32": (np.uint32, None),
    "bool": (np.bool_, None),
}
_HELD: dict[str, Any] = {
    "float16": np.float32,
    "float32": np.float32,
    "uint8": np.uint8,
    "int8": np.int8,
    "int32": np.int32,
    "uint32": np.uint32,
    "bool": np.bool_,
}


# --- Compressed constants, as iOS 16 has them ---


def _affine_dequantize(a: Arguments) -> Array:
    """(quantised - zero point) * scale, the latter two by the axis."""
    data = a["quantized_data"].astype(np.float32)
    along = [1] * data.ndim
    along[int(a["axis"])] = -1

    def spread(value: Array) -> Array:
        return value.astype(np.float32).reshape(along if value.ndim else ())

    result: Array = (data - spread(a["zero_point"])) * spread(a["scale"])
    return result


def _lut_to_dense(a: Arguments) -> Array:
    """Entries of a table of 2 ** bits, by indices that are packed from each byte's lowest bit on."""
    table, shape = a["lut"], tuple(int(n) for n in a["shape"])
    bits = int(table.size).bit_length() - 1
    count = int(np.prod(shape))
    # Eight indices take up so many bytes, and a 64-bit number holds them.
    packed = np.zeros(-(-count // 8) * bits, np.uint8)
    packed[: a["indices"].size] = a["indices"]
    words = np.zeros((packed.size // bits, 8), np.uint8)
    words[:, :bits] = packed.reshape(-1, bits)
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    indices = (words.view(np.uint64) >> shifts) & np.uint64(2**bits - 1)
    dense: Array = table[indices.reshape(-1)[:count]].reshape(shape)
    return dense


_COMPRESSED: dict[str, Callable[[Arguments], Array]] = {
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_lut_to_dense": _lut_to_dense,
}


# --- Operations ---


def _axes(a: Arguments) -> tuple[int, ...] | None:
    return tuple(int(n) for n in np.atleast_1d(a["axes"])) if "axes" in a else None


def _batch_norm(a: Arguments) -> Array:
    """By channels, which are axis 1."""
    x = a["x"]
    along = (1, -1) + (1,) * (x.ndim - 2)
    scale = a.get("gamma", np.float32(1)) / np.sqrt(a["variance"] + a.get("epsilon", np.float32(1e-5)))
    shift = a.get("beta", np.float32(0)) - a["mean"] * scale
    result: Array = x * np.reshape(scale, along) + np.reshape(shift, along)
    return result


def _concat(a: Arguments) -> Array:
    if bool(a.get("interleave", False)):
        raise ToolchainError("the evaluator has no interleaved concat. Use the tested coremltools.")
    return np.concatenate([np.atleast_1d(v) for v in a["values"]], axis=int(a["axis"]))


def _conv(a: Arguments) -> Array:
    """1x1 without padding: a product over the channels."""
    x, weight = a["x"], a["weight"]
    whole = set(weight.shape[2:]) == {1} and int(a.get("groups", 1)) == 1 and set(np.ravel(a.get("strides", 1))) == {1}
    if not whole or np.any(a.get("pad", 0)):
        raise ToolchainError(
            f"the evaluator has convolutions of 1x1, stride 1, one group and no padding only, not of {weight.shape}. "
            "Use the tested coremltools."
        )
    batch, channels, *places = x.shape
    product = weight.reshape(weight.shape[0], channels) @ x.reshape(batch, channels, -1)
    if "bias" in a:
        product += a["bias"][:, None]
    result: Array = product.reshape(batch, weight.shape[0], *places)
    return result


def _einsum(a: Arguments) -> Array:
    return np.asarray(np.einsum(a["equation"].replace(" ", ""), *a["values"]))


def _gather(a: Arguments) -> Array:
    if int(a.get("batch_dims", 0)):
        raise ToolchainError("the evaluator has no gather by batch. Use the tested coremltools.")
    return np.asarray(np.take(a["x"], a["indices"], axis=int(a.get("axis", 0))))


def _gelu(a: Arguments) -> Array:
    x = a["x"]
    if a.get("mode", "EXACT") != "EXACT":
        raise ToolchainError(f"the evaluator has the exact GELU only, not {a['mode']}. Use the tested coremltools.")
    error = torch.erf(torch.from_numpy(x * np.float32(0.5**0.5))).numpy()  # numpy has none
    result: Array = np.float32(0.5) * x * (1 + error)
    return result


def _layer_norm(a: Arguments) -> Array:
    x, axes = a["x"], _axes(a)
    centred = x - x.mean(axes, keepdims=True)
    result: Array = centred / np.sqrt((centred * centred).mean(axes, keepdims=True) + a.get("epsilon", 1e-5))
    along = [n if axes is None or i in [axis % x.ndim for axis in axes] else 1 for i, n in enumerate(x.shape)]
    if "gamma" in a:
        result = result * a["gamma"].reshape(along)
    if "beta" in a:
        result = result + a["beta"].reshape(along)
    return result


def _linear(a: Arguments) -> Array:
    result: Array = a["x"] @ a["weight"].T
    return result + a["bias"] if "bias" in a else result


def _matmul(a: Arguments) -> Array:
    x = np.swapaxes(a["x"], -1, -2) if bool(a.get("transpose_x", False)) else a["x"]
    y = np.swapaxes(a["y"], -1, -2) if bool(a.get("transpose_y", False)) else a["y"]
    return np.asarray(x @ y)


def _reduced(reduce: Callable[..., Any]) -> Callable[[Arguments], Array]:
    """A reduction along axes, all of them where none are given."""
    return lambda a: np.asarray(reduce(a["x"], axis=_axes(a), keepdims=bool(a.get("keep_dims", False))))


def _reshape(a: Arguments) -> Array:
    """0 keeps a size."""
    x = a["x"]
    shape = [int(n) or x.shape[i] for i, n in enumerate(a["shape"])]
    return np.asarray(x.reshape(shape))


def _slice_by_index(a: Arguments) -> Array:
    x = a["x"]
    begins, ends, nothing = a["begin"], a["end"], [False] * x.ndim
    steps = a.get("stride", [1] * x.ndim)
    open_begins, open_ends = a.get("begin_mask", nothing), a.get("end_mask", nothing)
    single = a.get("squeeze_mask", nothing)
    index: list[int | slice] = []
    for i in range(x.ndim):
        if single[i]:
            index.append(int(begins[i]))
        else:
            begin = None if open_begins[i] else int(begins[i])
            end = None if open_ends[i] else int(ends[i])
            index.append(slice(begin, end, int(steps[i])))
    return np.asarray(x[tuple(index)])


def _softmax(a: Arguments) -> Array:
    x, axis = a["x"], int(a.get("axis", -1))
    powers = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis, keepdims=True))


def _split(a: Arguments) -> Any:
    x, axis = a["x"], int(a["axis"])
    if "split_sizes" in a:
        return list(np.split(x, np.cumsum(a["split_sizes"])[:-1], axis))
    return list(np.split(x, int(a["num_splits"]), axis))


_OPERATIONS: dict[str, Callable[[Arguments], Any]] = {
    "abs": lambda a: np.abs(a["x"]),
    "add": lambda a: a["x"] + a["y"],
    "batch_norm": _batch_norm,
    "cast": lambda a: a["x"],  # the declared type of the result does it
    "concat": _concat,
    "conv": _conv,
    "einsum": _einsum,
    "expand_dims": lambda a: np.expand_dims(a["x"], _axes(a) or ()),
    "gather": _gather,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "maximum": lambda a: np.maximum(a["x"], a["y"]),
    "minimum": lambda a: np.minimum(a["x"], a["y"]),
    "mul": lambda a: a["x"] * a["y"],
    "not_equal": lambda a: a["x"] != a["y"],
    "real_div": lambda a: a["x"] / a["y"],
    "reduce_max": _reduced(np.max),
    "reduce_mean": _reduced(np.mean),
    "reduce_sum": _reduced(np.sum),
    "reshape": _reshape,
    "rsqrt": lambda a: 1 / np.sqrt(a["x"] + a.get("epsilon", np.float32(1e-12))),
    "shape": lambda a: np.array(a["x"].shape),
    "silu": lambda a: a["x"] / (1 + np.exp(-a["x"])),
    "slice_by_index": _slice_by_index,
    "softmax": _softmax,
    "split": _split,
    "squeeze": lambda a: np.squeeze(a["x"], _axes(a)),
    "sub": lambda a: a["x"] - a["y"],
    "transpose": lambda a: np.transpose(a["x"], a["perm"]),
}
