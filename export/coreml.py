"""CoreML packages of an encoder or a decoder: one for CPU and GPU, one for CPU and Neural Engine.

Both are mlprograms in half precision for iOS 16 and macOS 13, with one input and a few fixed lengths. What
coremltools did is read back from the saved package, since it passes over what it does not recognise without
a word.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export.ane import (
    NORM_EPSILON,
    AneDecoder,
    AneEncoder,
    RootNorm,
    causal_mask,
    check_supported,
    look_up,
    padding_of,
    rotations,
    token_weights,
    unit,
    unit_of_large,
)
from export.backbones import Backbone, hidden_states, is_causal
from export.checkpoint import Checkpoint
from export.errors import CheckpointError, ToolchainError
from export.mil import Input, MilProgram
from export.onnx import quiet

INPUT = "input_ids"
OUTPUT = "embedding"
LENGTHS = (16, 32, 64, 128)  # tokens of a text, padded to the next
MINIMUM_OS = "iOS 16, macOS 13"
_SPECIFICATION = 7  # of that minimum
_REMEDY = "Install the tested coremltools and torch."


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of package.

    Attributes:
        name: As a bundle names its variant.
        compute_units: What an app shall load it for, by coremltools' name; a package cannot hold it itself.
        network: The torch network that is traced: (1, tokens) int32 ids to (1, dim) float32.
        resident: Whether its hot path is held to what the Neural Engine can run.
    """

    name: str
    compute_units: str
    network: Callable[[Checkpoint], nn.Module]
    resident: bool


@dataclass(frozen=True, slots=True)
class Compression:
    """How weights are held in a package.

    Attributes:
        bits: Of a weight.
        operation: The MIL operation that takes them apart.
    """

    bits: int
    operation: str


@dataclass(frozen=True, slots=True)
class About:
    """What a package says of itself."""

    bundle: str
    version: str
    licence: str
    author: str
    source: str  # what it was made of


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written.

    Attributes:
        bytes: Size of the package, all files.
        seconds: Conversion, compression and checks.
        compressed: Number of weights that are held compressed.
        kept: Names of large weights that were left in half precision.
    """

    bytes: int
    seconds: float
    compressed: int
    kept: tuple[str, ...]


class PlainEncoder(nn.Module):
    """Token ids to a unit vector by the checkpoint's own layers, for one text."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Copy the network, since its norms' epsilons are changed."""
        super().__init__()
        self.padding = checkpoint.padding
        self.backbone: Backbone = deepcopy(checkpoint.backbone)
        for module in self.backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = max(module.eps, NORM_EPSILON)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(1, tokens) ids to (1, dim) float32; the mask is made of the padding id."""
        mask = (input_ids != self.padding).to(torch.float32)
        hidden = hidden_states(self.backbone, input_ids, mask)
        shares = mask / mask.sum(1, keepdim=True)  # before the sum, which fp16 then holds for long texts as well
        return unit((hidden * shares[:, :, None]).sum(1))


class PlainDecoder(nn.Module):
    """Token ids to a unit vector by a decoder, its mean or last-token pooling and its L2 normalisation, for one text.

    What is said of padding at :class:`export.ane.AneDecoder` holds here as well.
    """

    def __init__(self, checkpoint: Checkpoint, longest: int) -> None:
        """Make it of a checkpoint's decoder; weights are shared with it.

        Args:
            checkpoint: A supported decoder.
            longest: Tokens that there are positions for.
        """
        super().__init__()
        backbone = checkpoint.backbone
        self.padding, self.pooling = padding_of(checkpoint), checkpoint.pooling[0]
        self.words = backbone.embed_tokens
        self.layers = nn.ModuleList(PlainDecoderLayer(layer, backbone.config) for layer in backbone.layers)
        self.norm = RootNorm(backbone.norm)
        cos, sin = rotations(backbone, longest)
        scale = cos.shape[1] ** -0.5  # what turns the queries scales them as well
        turns = (cos * scale, sin * scale, cos, sin)
        self.turns = nn.ParameterList(nn.Parameter(table, requires_grad=False) for table in turns)
        self.causal = nn.Parameter(causal_mask(longest), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(1, tokens) ids, :func:`export.ane.padding_of` at the end, to (1, dim) float32."""
        tokens = input_ids.shape[1]
        hidden = look_up(self.words, input_ids)
        turns = [table[:tokens] for table in self.turns]
        for layer in self.layers:
            hidden = layer(hidden, turns, self.causal[:tokens, :tokens])
        weights = token_weights(input_ids, self.padding, self.pooling)
        return unit_of_large((self.norm(hidden) * weights[:, :, None]).sum(1))


class PlainDecoderLayer(nn.Module):
    """Attention and gated feed-forward, each behind its norm."""

    def __init__(self, layer: Any, config: Any) -> None:
        """Take over a layer of a Llama or a Qwen2 in transformers."""
        super().__init__()
        self.attention, self.feed_forward = layer.self_attn, layer.mlp
        self.width, self.kept = int(layer.self_attn.head_dim), int(config.num_key_value_heads)
        self.attention_norm = RootNorm(layer.input_layernorm)
        self.inner_norm = RootNorm(layer.post_attention_layernorm)

    def forward(self, hidden: torch.Tensor, turns: Sequence[torch.Tensor], causal: torch.Tensor) -> torch.Tensor:
        """(1, tokens, channels) to the same.

        Args:
            hidden: (1, tokens, channels).
            turns: Cosines and sines of the queries, then of the keys, (tokens, values of a head) each.
            causal: (tokens, tokens), added by query and key.
        """
        attention = self.attention
        normed = self.attention_norm(hidden)
        query = self._turned(self._heads(attention.q_proj(normed)), turns[0], turns[1])
        key = self._turned(self._heads(attention.k_proj(normed)), turns[2], turns[3])
        weights = (query @ key.transpose(2, 3) + causal).softmax(-1)
        mixed = (weights @ self._heads(attention.v_proj(normed))).permute(2, 0, 1, 3)
        hidden = hidden + attention.o_proj(mixed.reshape(1, -1, attention.o_proj.in_features))
        result: torch.Tensor = hidden + self.feed_forward(self.inner_norm(hidden))
        return result

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(1, tokens, channels) to (groups, heads of a group, tokens, width).

        A group has one key and value in common, which thus serve each head without being repeated.
        """
        return x.reshape(-1, self.kept, x.shape[-1] // (self.kept * self.width), self.width).permute(1, 2, 0, 3)

    def _turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary embedding: the halves of a head trade places."""
        first, second = torch.split(x, self.width // 2, dim=-1)
        return x * cos + torch.cat([second, first], dim=-1) * sin


def plain_network(checkpoint: Checkpoint) -> nn.Module:
    """The network of a package for CPU and GPU.

    Raises:
        CheckpointError: The checkpoint is of a kind that is not supported.
    """
    check_supported(checkpoint)
    network = PlainDecoder(checkpoint, LENGTHS[-1]) if is_causal(checkpoint.backbone) else PlainEncoder(checkpoint)
    return network.eval()


def ane_network(checkpoint: Checkpoint) -> nn.Module:
    """The network of a package for CPU and Neural Engine.

    Raises:
        CheckpointError: As :func:`plain_network`.
    """
    check_supported(checkpoint)
    return AneDecoder(checkpoint, LENGTHS[-1]).eval() if is_causal(checkpoint.backbone) else AneEncoder.of(checkpoint)


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("coreml-metal", "CPU_AND_GPU", plain_network, False),
        Profile("coreml-ane", "CPU_AND_NE", ane_network, True),
    )
}
# Lowest cosine to the fp32 network on tasks, without compression and with it. Palettes of 4 bits miss theirs: 0.93
# with ruvltra-mini, 0.86 with MiniLM.
MINIMUM_COSINE = 0.999
MINIMUM_COSINE_COMPRESSED = 0.99
COMPRESSIONS: dict[str, Compression] = {
    "int8": Compression(8, "constexpr_affine_dequantize"),
    "palette8": Compression(8, "constexpr_lut_to_dense"),
    "palette6": Compression(6, "constexpr_lut_to_dense"),
    "palette4": Compression(4, "constexpr_lut_to_dense"),
}


@dataclass(frozen=True, slots=True)
class Package:
    """A variant of a bundle that is a CoreML package.

    Attributes:
        profile: Of ``PROFILES``.
        compression: Of ``COMPRESSIONS``; None for half precision.
        minimum_cosine: Lowest cosine to the fp32 network on tasks, in emulated half precision.
        elsewhere: The same for padded texts and strings that are no tasks.
        precision: For the manifest.
    """

    profile: Profile
    compression: str | None
    minimum_cosine: float
    elsewhere: float
    precision: str


# The variants by id: a profile's name, and how weights are held where it is not in half precision.
PACKAGES: dict[str, Package] = {
    name: Package(profile, None, MINIMUM_COSINE, 0.99, "float16 weights and activations")
    for name, profile in PROFILES.items()
} | {
    f"{name}-{how}": Package(profile, how, MINIMUM_COSINE_COMPRESSED, 0.97, f"{how} weights, float16 activations")
    for name, profile in PROFILES.items()
    for how in COMPRESSIONS
}
# Weights of so many values or fewer stay as they are, and biases and norms of any size. So do the tables of positions,
# rotations among them, and of token types, and the causal mask: they are small, are used for every token, and int4
# blocks made an error of 57 % in positions.
_SMALL = 2048
_TABLES = ("position", "token_type", "turns", "causal")


def convert(
    checkpoint: Checkpoint, profile: Profile, path: Path, about: About, compression: str | None = None
) -> Conversion:
    """Write a package, and hold what it says against what was asked for.

    Input ``input_ids``, int32 (1, 16, 32, 64 or 128 tokens), padded at the end with :func:`padding_of`;
    output ``embedding``, float32 (1, dim), of unit length.

    Args:
        checkpoint: A BERT with mean pooling, or a Llama- or Qwen2-like decoder with mean or last-token pooling.
        profile: Of ``PROFILES``.
        path: Where the package shall be, a folder whose name ends in ``.mlpackage``; one that is there is replaced.
        about: What the package says of itself.
        compression: Of ``COMPRESSIONS``; None leaves half precision.

    Raises:
        CheckpointError: The checkpoint is of another kind, or too short for the lengths.
        ToolchainError: coremltools fails, or did something else than it was asked to.
    """
    start = time.perf_counter()
    network = profile.network(checkpoint)
    positions = int(checkpoint.backbone.config.max_position_embeddings)
    if positions < LENGTHS[-1]:
        raise CheckpointError(
            f"{checkpoint.folder}: has {positions} positions, packages take up to {LENGTHS[-1]} tokens. Leave the "
            "CoreML variants out, or use another model."
        )
    kept: tuple[str, ...] = ()
    with _quiet(f"the conversion to {profile.name}"):
        model = _mlprogram(network)
    count = 0
    if compression is not None:
        with _quiet(f"compressing {profile.name} to {compression}"):
            model, count, kept = _compressed(model, compression)
    described = _describe(model, profile, about, checkpoint, compression)
    with _quiet(f"saving {path.name}"):
        model.save(str(path))
    program = MilProgram(path)
    _check_saved(program, described, checkpoint.dim)
    if compression is not None:
        _check_compressed(program, COMPRESSIONS[compression], count)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Conversion(size, time.perf_counter() - start, len(program.compressed), kept)


@contextlib.contextmanager
def _quiet(stage: str) -> Iterator[None]:
    """Like :func:`export.onnx.quiet`, without coremltools' progress bars as well."""
    with quiet(stage), contextlib.redirect_stderr(io.StringIO()):
        yield


def _mlprogram(network: nn.Module) -> Any:
    import coremltools as ct

    shapes = [(1, length) for length in LENGTHS]
    example = torch.ones(1, LENGTHS[-1], dtype=torch.int32)
    with torch.no_grad():
        traced = torch.jit.trace(network, (example,), check_trace=False)  # type: ignore[no-untyped-call]
    # With skip_model_load coremltools does not try to run what it made, which only macOS can.
    return ct.convert(
        traced,
        inputs=[ct.TensorType(INPUT, shape=ct.EnumeratedShapes(shapes, default=shapes[-1]), dtype=np.int32)],
        outputs=[ct.TensorType(OUTPUT, dtype=np.float32)],
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT16,
        skip_model_load=True,
    )


def _compressed(model: Any, name: str) -> tuple[Any, int, tuple[str, ...]]:
    """The model compressed, how many of its weights should be, and the names of large ones that are left out."""
    import coremltools.optimize.coreml as cto

    large = cto.get_weights_metadata(model, weight_threshold=_SMALL + 1)  # which it counts in, unlike compression
    kept = tuple(
        name
        for name, weight in large.items()
        if any(table in name for table in _TABLES) or max(weight.val.shape) == weight.val.size
    )
    compression = COMPRESSIONS[name]
    settings: Any
    if name.startswith("palette"):
        settings = cto.OpPalettizerConfig(mode="kmeans", nbits=compression.bits, weight_threshold=_SMALL)
        apply = cto.palettize_weights
    else:
        settings = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=_SMALL)
        apply = cto.linear_quantize_weights
    config = cto.OptimizationConfig(global_config=settings, op_name_configs=dict.fromkeys(kept))
    return apply(model, config), len(large) - len(kept), kept


def _describe(
    model: Any, profile: Profile, about: About, checkpoint: Checkpoint, compression: str | None
) -> dict[str, Any]:
    """Write a model's metadata; returns what the saved spec must then say."""
    weights = "half precision" if compression is None else f"weights {compression}"
    padding = padding_of(checkpoint)
    user_defined = {
        "bundle": about.bundle,
        "variant": profile.name,
        "compute_units": profile.compute_units,
        "source": about.source,
        "padding_id": str(padding),
        "weights": weights,
    }
    model.author = about.author
    model.license = about.licence
    model.version = about.version
    model.short_description = (
        f"{about.bundle} {about.version}: embeds a short text as a unit vector of {checkpoint.dim} values; {weights}, "
        f"for {profile.compute_units}."
    )
    model.input_description[INPUT] = (
        f"Token ids of one text, padded at the end with {padding} to {', '.join(map(str, LENGTHS))} tokens."
    )
    model.output_description[OUTPUT] = f"The text's embedding: {checkpoint.dim} values of length 1 together."
    model.user_defined_metadata.update(user_defined)
    return {
        "author": about.author,
        "license": about.licence,
        "versionString": about.version,
        "shortDescription": model.short_description,
        "userDefined": user_defined,
    }


def _check_saved(program: MilProgram, described: Mapping[str, Any], dim: int) -> None:
    """Raise ToolchainError unless the saved spec has the interface, the target and the metadata asked for."""
    description = program.spec.description
    output = [(v.name, tuple(v.type.multiArrayType.shape), v.type.multiArrayType.dataType) for v in description.output]
    float32 = description.output[0].type.multiArrayType.FLOAT32
    userdefined = {key: description.metadata.userDefined.get(key) for key in described["userDefined"]}
    found = {key: getattr(description.metadata, key) for key in described if key != "userDefined"}
    wrong = [
        what
        for what, fits in {
            "inputs": program.inputs == {INPUT: Input("int32", tuple((1, length) for length in LENGTHS))},
            "output": output == [(OUTPUT, (1, dim), float32)],
            "minimum target": program.spec.specificationVersion == _SPECIFICATION,
            "metadata": found | {"userDefined": userdefined} == described,
            "descriptions": bool(description.input[0].shortDescription and description.output[0].shortDescription),
        }.items()
        if not fits
    ]
    if wrong:
        raise ToolchainError(f"{program.path}: was saved with wrong {', '.join(wrong)}. {_REMEDY}")


def _check_compressed(program: MilProgram, compression: Compression, expected: int) -> None:
    """Raise ToolchainError unless all weights that were to be compressed are, and take as few bits as asked for."""
    done = [weight for weight in program.compressed.values() if weight.operation == compression.operation]
    if len(done) != expected or not done:
        raise ToolchainError(f"{program.path}: {len(done)} of {expected} weights were compressed. {_REMEDY}")
    bits = 8 * sum(weight.bytes for weight in done) / sum(weight.values for weight in done)
    # Scales and tables take little, but more of small matrices.
    if bits > compression.bits + 2:
        raise ToolchainError(
            f"{program.path}: weights take {bits:.1f} bits where {compression.bits} were asked for. {_REMEDY}"
        )
