"""CoreML packages of Llama- and Qwen2-like decoders, small and with random weights, run by the evaluator."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn

from edge import Bundle
from edge.doctor import examine
from export.ane import RootNorm, padding_of
from export.backbones import ARCHITECTURES
from export.checkpoint import Checkpoint
from export.cli import main
from export.coreml import LENGTHS, MINIMUM_COSINE, PROFILES, Profile, ane_network, convert, plain_network
from export.errors import CheckpointError
from export.mil import _OPERATIONS, MilProgram
from export.parity import run_network, run_package
from export.residency import measure_residency, require_resident
from tests.export.test_coreml import ABOUT, SCHEMA, Packages, gate, lowest_cosine, padded
from tests.export.test_gguf import rewrite, write

VOCABULARY = 500
END = 7  # ends texts, and is the tokenizer's padding
NETWORKS = {"coreml-metal": plain_network, "coreml-ane": ane_network}
CLOSE = 0.9999


def decoder(kind: str, pooling: str, seed: int = 5, **more: Any) -> Checkpoint:
    """Two layers, four heads in two groups, with norms and biases that are not at their start."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "pad_token_id": END,
    }
    architecture = ARCHITECTURES[kind]
    network = architecture.make(architecture.config({"model_type": kind} | sizes | more)).eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    tokenizer = Tokenizer(models.WordLevel({"a": 1}, unk_token="a"))
    return Checkpoint(Path(kind), network, tokenizer, 256, None, pooling=(pooling,))


# What ends in whose vector, and more heads than one a group.
SMALL = {"qwen2": decoder("qwen2", "lasttoken"), "llama": decoder("llama", "mean")}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Packages by profile and network, each made once; not to be changed."""
    folder = tmp_path_factory.mktemp("packages")

    def package(profile: str, network: str | None) -> Path:
        path = folder / f"{profile}-{network}.mlpackage"
        if not path.exists():
            convert(SMALL[network or ""], PROFILES[profile], path, ABOUT)
        return path

    return package


def vectors(run: Callable[..., Any], rows: list[list[int]]) -> torch.Tensor:
    arrays = [np.array([row]) for row in rows]
    return torch.from_numpy(np.concatenate([run(ids, np.ones_like(ids)) for ids in arrays]))


class TestNetworks:
    """In torch, before anything is converted."""

    @pytest.mark.parametrize("profile", PROFILES)
    @pytest.mark.parametrize(
        "checkpoint",
        [
            *(decoder(kind, pooling) for kind in ("qwen2", "llama") for pooling in ("mean", "lasttoken")),
            decoder("qwen2", "mean", num_attention_heads=2, num_key_value_heads=2),
            decoder("qwen2", "lasttoken", num_key_value_heads=1),
            decoder("llama", "lasttoken", head_dim=24, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
            decoder(
                "llama",
                "mean",
                rope_scaling={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
        ],
    )
    @torch.no_grad()
    def test_equals_the_encoder(self, profile: str, checkpoint: Checkpoint) -> None:
        ids, mask = padded([1, 2, 31, 128], 128)
        expected = checkpoint.encoder()(ids, mask)
        network = NETWORKS[profile](checkpoint)
        ids = torch.where(mask == 1, ids, padding_of(checkpoint)).int()
        found = torch.cat([network(row[None]) for row in ids])
        assert found.shape == expected.shape
        assert lowest_cosine(found, expected) >= 0.999999
        assert torch.allclose(found.norm(dim=1), torch.ones(4), atol=1e-5)

    @torch.no_grad()
    def test_weights_are_shared(self) -> None:
        checkpoint = SMALL["qwen2"]
        own = {value.data_ptr() for value in checkpoint.backbone.parameters()}
        for make in NETWORKS.values():
            values = {value.data_ptr() for value in make(checkpoint).parameters()}
            assert own <= values  # each tensor has its place, and none is copied

    @pytest.mark.parametrize("profile", PROFILES)
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"pooling": ("cls",)}, "the pooling cls; only mean or lasttoken"),
            ({"pooling": ("mean", "lasttoken")}, "the pooling mean, lasttoken"),
            ({"dense": (nn.Linear(64, 8),)}, "dense layers"),
            ({"backbone": decoder("llama", "mean", hidden_act="gelu").backbone}, "the activation 'gelu'; only 'silu'"),
        ],
    )
    def test_other_kinds_are_refused(self, profile: str, change: dict[str, Any], says: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=says):
            convert(replace(SMALL["llama"], **change), PROFILES[profile], tmp_path / "a.mlpackage", ABOUT)


class TestPackages:
    @pytest.mark.parametrize("network", SMALL)
    @pytest.mark.parametrize("profile", PROFILES)
    def test_equals_the_network(self, profile: str, network: str, packages: Packages) -> None:
        path = packages(profile, network)
        for mode in ("float32", "declared"):
            report = gate(SMALL[network], path, CLOSE, mode)
            assert not report.failures
        assert report.cosine_min < 1  # half precision was emulated

    @pytest.mark.parametrize("network", SMALL)
    @pytest.mark.parametrize("profile", PROFILES)
    def test_padding_changes_nothing(self, profile: str, network: str, packages: Packages) -> None:
        program = MilProgram(packages(profile, network))
        ids, _ = padded([13], 13)
        found = []
        for length in LENGTHS:
            row = np.full((1, length), VOCABULARY, np.int32)
            row[:, :13] = ids
            found.append(program.run({"input_ids": row}, "float32")["embedding"])
        for one in found[1:]:
            assert np.allclose(one, found[0], atol=1e-5)

    @pytest.mark.parametrize("network", SMALL)
    @pytest.mark.parametrize("profile", PROFILES)
    def test_the_padding_token_is_a_token(self, profile: str, network: str, packages: Packages) -> None:
        """It ends texts in many a tokenizer, so that it counts, wherever it is."""
        checkpoint = SMALL[network]
        assert checkpoint.padding == END
        rows = [[5, 9, END], [5, 9], [END, 5, END, 9, END, END], [END], [VOCABULARY - 1, 5], [5] * 15 + [END]]
        expected = vectors(run_network(checkpoint), rows)
        found = vectors(run_package(MilProgram(packages(profile, network))), rows)
        assert lowest_cosine(found, expected) >= CLOSE
        assert lowest_cosine(found[:1], found[1:2]) < 0.99

    @pytest.mark.parametrize("profile", PROFILES)
    def test_says_how_it_is_padded(self, profile: str, packages: Packages) -> None:
        description = MilProgram(packages(profile, "qwen2")).spec.description
        assert description.metadata.userDefined["padding_id"] == str(VOCABULARY)
        assert f"padded at the end with {VOCABULARY} to" in description.input[0].shortDescription

    def test_residency(self, packages: Packages) -> None:
        residency = measure_residency(MilProgram(packages("coreml-ane", "qwen2")), 32)
        require_resident(residency, transposes=2)
        assert residency.share == 1.0
        hidden, inner, tokens, layers = 64, 96, 32, 2
        weights = 3 * hidden * hidden + 3 * hidden * inner  # two groups' keys and values are as large as one output
        assert residency.macs == layers * (tokens * weights + 2 * tokens * tokens * hidden)
        assert measure_residency(MilProgram(packages("coreml-metal", "qwen2")), 32).share < 0.5

    @pytest.mark.parametrize("profile", PROFILES)
    def test_palettes(self, profile: str, tmp_path: Path) -> None:
        """All matrices and the embedding in 4 bits; tables and norms are left."""
        path = tmp_path / "small.mlpackage"
        made = convert(SMALL["llama"], PROFILES[profile], path, ABOUT, "palette4")
        program = MilProgram(path)
        assert made.compressed == len(program.compressed) == 2 * 5 + 1  # keys' and values' are below the threshold
        for weight in program.compressed.values():
            assert weight.operation == "constexpr_lut_to_dense"
            assert weight.bytes <= weight.values // 2 + 16 * 2 + 64  # indices, table, shape
        assert all("turns" in name or "causal" in name for name in made.kept)
        report = gate(SMALL["llama"], path)
        assert 0.8 < report.cosine_min < MINIMUM_COSINE
        assert report.failures

    @pytest.mark.parametrize("profile", PROFILES)
    def test_a_missing_mask_is_seen(self, profile: str, tmp_path: Path) -> None:
        @torch.no_grad()
        def without_mask(checkpoint: Checkpoint) -> nn.Module:
            network = NETWORKS[profile](checkpoint)
            network.causal.zero_()
            return network

        path = tmp_path / "a.mlpackage"
        convert(SMALL["qwen2"], replace(PROFILES[profile], network=without_mask), path, ABOUT)
        assert gate(SMALL["qwen2"], path).failures

    def test_too_few_positions(self, tmp_path: Path) -> None:
        short = decoder("llama", "mean", max_position_embeddings=64)
        with pytest.raises(CheckpointError, match="64 positions"):
            convert(short, PROFILES["coreml-metal"], tmp_path / "a.mlpackage", ABOUT)


class TestLargeStates:
    """Residual streams of real decoders exceed 1,000, and 1,000 squared is infinite in half precision."""

    @staticmethod
    @torch.no_grad()
    def loud() -> Checkpoint:
        checkpoint = decoder("qwen2", "lasttoken")
        backbone = checkpoint.backbone
        backbone.embed_tokens.weight.mul_(5000)
        for layer in backbone.layers:
            layer.self_attn.o_proj.weight.mul_(2000)
            layer.mlp.down_proj.weight.mul_(500)
        backbone.norm.weight.mul_(200)  # the vector's own squares, too
        return checkpoint

    @pytest.mark.parametrize("profile", PROFILES)
    def test_are_held(self, profile: str, tmp_path: Path) -> None:
        checkpoint, path = self.loud(), tmp_path / "loud.mlpackage"
        convert(checkpoint, PROFILES[profile], path, ABOUT)
        largest: list[float] = []
        program = MilProgram(path)
        ids, _ = padded([16], 16)
        program.run(
            {"input_ids": ids.numpy().astype(np.int32)},
            observe=lambda operation, _, results: largest.extend(
                float(np.abs(one).max()) for one in results if operation.kind == "add"
            ),
        )
        assert 1000 < max(largest) < 60_000
        assert not gate(checkpoint, path, CLOSE).failures

    def test_are_not_by_a_plain_norm(self, tmp_path: Path) -> None:
        class PlainNorm(nn.Module):
            def __init__(self, norm: RootNorm) -> None:
                super().__init__()
                self.weight, self.epsilon = norm.weight, float(norm.root.square())

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.epsilon) * self.weight

        def naive(checkpoint: Checkpoint) -> nn.Module:
            network = plain_network(checkpoint)
            for name, module in list(network.named_modules()):
                if isinstance(module, RootNorm):
                    network.set_submodule(name, PlainNorm(module))
            return network

        checkpoint, path = self.loud(), tmp_path / "naive.mlpackage"
        convert(checkpoint, Profile("coreml-metal", "CPU_AND_GPU", naive, False), path, ABOUT)
        assert not gate(checkpoint, path, CLOSE, "float32").failures
        assert "vectors of tasks are not finite" in gate(checkpoint, path).failures

    @torch.no_grad()
    def test_norms_of_next_to_nothing(self) -> None:
        norm = SMALL["llama"].backbone.norm
        generator = torch.Generator().manual_seed(2)
        for size in (0.0, 1e-30, 1e-6, 1e-3, 1.0, 1e4):
            x = size * torch.randn(1, 5, 64, generator=generator)
            expected = norm(x)
            for found in (RootNorm(norm)(x), RootNorm(norm, 4)(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)):
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7), size


@pytest.mark.parametrize(
    ("kind", "parameters", "expected"),
    [
        ("abs", {}, torch.abs),
        ("silu", {}, nn.functional.silu),
        ("reduce_max", {"axes": np.array([1]), "keep_dims": np.array(True)}, lambda x: x.amax(1, keepdim=True)),
        ("reduce_mean", {"axes": np.array([-1]), "keep_dims": np.array(False)}, lambda x: x.mean(-1)),
        ("reduce_sum", {"keep_dims": np.array(True)}, lambda x: x.sum((0, 1, 2), keepdim=True)),
        ("maximum", {"y": np.float32(0.3)}, lambda x: torch.maximum(x, torch.tensor(0.3))),
        ("minimum", {"y": np.float32(0.3)}, lambda x: torch.minimum(x, torch.tensor(0.3))),
    ],
)
def test_operations_are_torchs(
    kind: str, parameters: dict[str, Any], expected: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = 50 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3))
    x[0, 0, :2] = torch.tensor([-200.0, 200.0])
    with np.errstate(over="ignore"):
        found = _OPERATIONS[kind]({"x": x.numpy()} | parameters)
    np.testing.assert_allclose(found, expected(x).numpy(), rtol=1e-6, atol=1e-6)


def test_packages_in_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a GGUF file: converted, proven, listed, and proven again by verify."""
    write(tmp_path / "short.gguf", "qwen2")
    source = rewrite(tmp_path / "short.gguf", {"qwen2.context_length": 256})
    out = tmp_path / "bundle"
    ane, palette = "coreml-ane", "coreml-metal-palette4"
    arguments = ["--variants", f"fp32,{ane},{palette}", "--minimum-cosine", f"{palette}=0.9", "--quiet"]
    assert main(["bundle", str(source), "--out", str(out), *arguments]) == 0
    manifest = json.loads((out / "bundle.json").read_bytes())
    jsonschema.validate(manifest, SCHEMA)
    bundle = Bundle.open(out)
    rows = len(json.loads((out / "tokenizer.json").read_bytes())["model"]["vocab"])
    for name, bound in ((ane, 0.9999), (palette, 0.9)):
        variant = bundle.variant(name)
        assert (variant.runtime, variant.lengths, variant.padding_id) == ("coreml", LENGTHS, rows)
        assert variant.minimum_os == "iOS 16, macOS 13"
        assert variant.parity["cosine_min"] >= bound
        assert variant.parity["grid_cosine_min"] >= bound
    assert bundle.variant(ane).parity["resident"] == 1
    assert all(check.ok for check in examine(out))
    capsys.readouterr()
    assert main(["verify", str(out), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["stage"] for stage in stages] == [ane, palette]
