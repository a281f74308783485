from __future__ import annotations

import json
import shutil
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
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from edge import Bundle
from edge.doctor import examine
from export.ane import AneEncoder
from export.checkpoint import Checkpoint
from export.cli import main
from export.coreml import LENGTHS, MINIMUM_COSINE, MINIMUM_COSINE_COMPRESSED, PROFILES, About, convert
from export.errors import CheckpointError, ParityError, ToolchainError
from export.mil import Input, MilProgram, Mode
from export.parity import NETWORK, Inputs, Reference, Report, run_network, run_package
from export.residency import measure_residency, require_resident
from tests.conftest import MINI, ROOT
from tests.export.conftest import MINILM

PADDING = 0
SCHEMA = json.loads((ROOT / "docs" / "bundle.schema.json").read_text("utf-8"))


ABOUT = About("some-bundle", "1.2.3", "Apache-2.0", "somebody", "a random network")
Packages = Callable[[str, str | None], Path]


def random_bert(hidden: int = 64, positions: int = 128) -> Checkpoint:
    """Two layers, four heads, with biases and norms that are not at their start."""
    generator = torch.Generator().manual_seed(5)
    config = BertConfig(
        vocab_size=500,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=positions,
        pad_token_id=PADDING,
    )
    config._attn_implementation = "eager"
    network = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.2 * noise if "LayerNorm.weight" in name else 0.2 * noise)
    return Checkpoint(MINILM, network, Tokenizer(models.WordLevel({"a": 1}, unk_token="a")), positions, None)


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    return random_bert()


@pytest.fixture(scope="module")
def packages(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Packages of the random BERT by profile and compression, each made once; not to be changed."""
    folder = tmp_path_factory.mktemp("packages")

    def package(profile: str, compression: str | None) -> Path:
        path = folder / f"{profile}-{compression}.mlpackage"
        if not path.exists():
            convert(small, PROFILES[profile], path, ABOUT, compression)
        return path

    return package


def gate(checkpoint: Checkpoint, path: Path, bound: float = MINIMUM_COSINE, mode: Mode = "declared") -> Report:
    """The package in the evaluator against the network in torch, on random texts of 3 to 128 tokens."""
    ids, mask = padded([3, 5, 9, 15, 16, 20, 40, 70, 128], 128)
    rows = [row[keep.bool()][None].numpy() for row, keep in zip(ids, mask, strict=True)]
    inputs = Inputs([str(len(row)) for row in rows], [(row, np.ones_like(row)) for row in rows], [], {})
    reference = Reference(inputs, NETWORK, run_network(checkpoint))
    return reference.compare(run_package(MilProgram(path), mode), path.name, bound, bound)


def changed(package: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """A copy whose program was changed: ``change`` gets its operations."""
    from coremltools.proto import Model_pb2

    copy = folder / package.name
    shutil.copytree(package, copy)
    file = copy / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = Model_pb2.Model.FromString(file.read_bytes())
    function = spec.mlProgram.functions["main"]
    change(function.block_specializations[function.opset].operations)
    file.write_bytes(spec.SerializeToString())
    return copy


def constant(operations: Any, name: str) -> Any:
    """The value of a constant."""
    (found,) = (o.attributes["val"] for o in operations if o.type == "const" and o.outputs[0].name == name)
    return found


def first(operations: Any, kind: str) -> Any:
    return next(operation for operation in operations if operation.type == kind)


def padded(lengths: list[int], tokens: int, vocabulary: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their mask, each row filled to its length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocabulary, (len(lengths), tokens), generator=generator)
    mask = (torch.arange(tokens)[None, :] < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def lowest_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double(), b.double()).min())


class TestAneEncoder:
    @pytest.mark.parametrize("which", ["small", "minilm"])
    def test_equals_the_encoder(self, which: str, request: pytest.FixtureRequest) -> None:
        checkpoint: Checkpoint = request.getfixturevalue(which)
        ids, mask = padded([1, 2, 31, 32], 32)
        with torch.no_grad():
            expected = checkpoint.encoder()(ids, mask)
            network = AneEncoder.of(checkpoint)
            vectors = torch.cat([network(row[None].int()) for row in ids])
        assert vectors.shape == expected.shape
        assert lowest_cosine(vectors, expected) >= 0.99999
        assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-4)

    def test_padding_changes_nothing(self, small: Checkpoint) -> None:
        ids, _ = padded([9], 9)
        network = AneEncoder.of(small)
        with torch.no_grad():
            alone, among = network(ids), network(nn.functional.pad(ids, (0, 55), value=PADDING))
        assert torch.allclose(alone, among, atol=1e-6)

    def test_every_tensor_must_have_a_place(self, small: Checkpoint) -> None:
        with_pooler = BertModel(small.backbone.config)
        with pytest.raises(CheckpointError, match=r"without a place \['pooler\.dense\.weight'"):
            AneEncoder.of(replace(small, backbone=with_pooler))
        fewer = BertModel(small.backbone.config, add_pooling_layer=False)
        del fewer.encoder.layer[1].output.LayerNorm.bias
        with pytest.raises(CheckpointError, match=r"missing \['layers\.1\.output_norm\.bias'\]"):
            AneEncoder.of(replace(small, backbone=fewer))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"pooling": ("cls",)}, "the pooling cls"),
            ({"pooling": ("mean", "max")}, "the pooling mean, max"),
            ({"dense": (nn.Linear(64, 8),)}, "dense layers"),
        ],
    )
    def test_other_kinds_are_refused(self, small: Checkpoint, change: dict[str, object], says: str) -> None:
        with pytest.raises(CheckpointError, match=says):
            AneEncoder.of(replace(small, **change))


class TestConvert:
    @pytest.mark.parametrize("profile", PROFILES)
    def test_half_precision(self, profile: str, packages: Packages, small: Checkpoint) -> None:
        for mode in ("float32", "declared"):
            report = gate(small, packages(profile, None), mode=mode)
            assert not report.failures
        assert report.cosine_min < 1  # half precision was emulated

    @pytest.mark.parametrize("profile", PROFILES)
    @pytest.mark.parametrize("compression", ["int8", "palette6"])
    def test_compressed(self, profile: str, compression: str, packages: Packages, small: Checkpoint) -> None:
        path = packages(profile, compression)
        assert not gate(small, path, MINIMUM_COSINE_COMPRESSED).failures
        program = MilProgram(path)
        assert len(program.compressed) == 2 * 6 + 1
        assert not any("position" in name for name in program.compressed)

    def test_real_weights(self, minilm: Checkpoint, tmp_path: Path) -> None:
        for profile, compression in (("coreml-metal", None), ("coreml-ane", "int8")):
            path = tmp_path / f"{profile}.mlpackage"
            result = convert(minilm, PROFILES[profile], path, ABOUT, compression)
            bound = MINIMUM_COSINE_COMPRESSED if compression else MINIMUM_COSINE
            assert not gate(minilm, path, bound).failures
            assert result.bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            assert result.bytes < (24e6 if compression else 46e6)
        require_resident(measure_residency(MilProgram(path), 64), transposes=6)

    @pytest.mark.parametrize("profile", PROFILES)
    def test_says_what_it_is(self, profile: str, packages: Packages, capfd: pytest.CaptureFixture[str]) -> None:
        program = MilProgram(packages(profile, None))
        assert program.inputs == {"input_ids": Input("int32", tuple((1, n) for n in LENGTHS))}
        assert program.outputs == ("embedding",)
        assert program.spec.specificationVersion == 7  # iOS 16, macOS 13
        description = program.spec.description
        kind = description.output[0].type.multiArrayType
        assert (tuple(kind.shape), kind.ArrayDataType.Name(kind.dataType)) == ((1, 64), "FLOAT32")
        metadata = description.metadata
        assert (metadata.author, metadata.license, metadata.versionString) == ("somebody", "Apache-2.0", "1.2.3")
        assert metadata.userDefined["compute_units"] == PROFILES[profile].compute_units
        assert metadata.userDefined["bundle"] == "some-bundle"
        assert metadata.userDefined["padding_id"] == "0"
        assert "16, 32, 64, 128 tokens" in description.input[0].shortDescription
        assert "64 values" in description.output[0].shortDescription
        assert capfd.readouterr() == ("", "")  # none of coremltools' chatter

    def test_too_few_positions(self, tmp_path: Path) -> None:
        short = random_bert(positions=64)
        with pytest.raises(CheckpointError, match="64 positions"):
            convert(short, PROFILES["coreml-ane"], tmp_path / "a.mlpackage", ABOUT)

    def test_another_architecture(self, small: Checkpoint, tmp_path: Path) -> None:
        other = DistilBertModel(DistilBertConfig(dim=64, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=50))
        for profile in PROFILES.values():
            with pytest.raises(CheckpointError, match="model_type 'distilbert'"):
                convert(replace(small, backbone=other), profile, tmp_path / "a.mlpackage", ABOUT)

    def test_compression_that_does_nothing_is_an_error(self, tmp_path: Path) -> None:
        """All matrices are below the threshold, and coremltools says nothing of it."""
        tiny = random_bert(hidden=4)
        with pytest.raises(ToolchainError, match="0 of 0 weights were compressed"):
            convert(tiny, PROFILES["coreml-ane"], tmp_path / "a.mlpackage", ABOUT, "int8")


class TestWrongPackages:
    """What is wrong in a package must fail its gate."""

    @pytest.mark.parametrize("profile", PROFILES)
    def test_swapped_weights(self, profile: str, packages: Packages, small: Checkpoint, tmp_path: Path) -> None:
        offsets = []

        def find(operations: Any) -> None:
            for operation in operations:
                value = operation.attributes["val"]
                name = operation.outputs[0].name
                if value.HasField("blobFileValue") and "layer" in name and "weight" in name and "_0_" in name:
                    offsets.extend([value.blobFileValue.offset] if "key" in name or "value" in name else [])

        copy = changed(packages(profile, None), tmp_path, find)
        assert len(offsets) == 2
        file = copy / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
        data = bytearray(file.read_bytes())
        a, b = (slice(offset + 64, offset + 64 + 64 * 64 * 2) for offset in offsets)
        data[a], data[b] = data[b], data[a]
        file.write_bytes(data)
        assert gate(small, copy).failures

    @pytest.mark.parametrize("profile", PROFILES)
    def test_no_mask(self, profile: str, packages: Packages, small: Checkpoint, tmp_path: Path) -> None:
        dropped = []

        def drop(operations: Any) -> None:
            for operation in operations:
                held = operation.attributes["val"].immediateValue.tensor
                if operation.type == "const" and held.bytes.values == np.float16(-1e4).tobytes():
                    held.bytes.values = np.float16(0).tobytes()
                    dropped.append(operation.outputs[0].name)

        copy = changed(packages(profile, None), tmp_path, drop)
        assert len(dropped) == 1
        assert gate(small, copy).failures

    def test_another_equation(self, packages: Packages, small: Checkpoint, tmp_path: Path) -> None:
        """Attention weights taken by the wrong axis; all shapes are as before."""

        def change(operations: Any) -> None:
            values = [
                constant(operations, o.inputs["equation"].arguments[0].name) for o in operations if o.type == "einsum"
            ]
            strings = [value.immediateValue.tensor.strings for value in values]
            product = next(s for s in strings if s.values[0].replace(" ", "") == "bchk,bkhq->bchq")
            product.values[0] = "bchk,bqhk->bchq"

        assert gate(small, changed(packages("coreml-ane", None), tmp_path, change)).failures

    def test_another_transpose(self, packages: Packages, small: Checkpoint, tmp_path: Path) -> None:
        def change(operations: Any) -> None:
            second = [operation for operation in operations if operation.type == "matmul"][1]
            held = constant(operations, second.inputs["transpose_x"].arguments[0].name)
            assert not held.immediateValue.tensor.bools.values[0]
            held.immediateValue.tensor.bools.values[0] = True

        assert gate(small, changed(packages("coreml-metal", None), tmp_path, change)).failures

    def test_wrong_shape(self, packages: Packages, small: Checkpoint, tmp_path: Path) -> None:
        """A transpose by other axes is seen by the shapes that the program declares."""

        def change(operations: Any) -> None:
            held = constant(operations, first(operations, "transpose").inputs["perm"].arguments[0].name)
            held.immediateValue.tensor.ints.values[:] = list(range(len(held.immediateValue.tensor.ints.values)))

        with pytest.raises(ToolchainError, match=r"transpose .* gives the shape"):
            gate(small, changed(packages("coreml-metal", None), tmp_path, change))

    def test_unknown_operation(self, packages: Packages, tmp_path: Path) -> None:
        def change(operations: Any) -> None:
            first(operations, "softmax").type = "hardmax"

        with pytest.raises(ToolchainError, match=r"coreml-ane-None\.mlpackage: the operation 'hardmax' is not known"):
            MilProgram(changed(packages("coreml-ane", None), tmp_path, change))

    def test_broken_files(self, packages: Packages, tmp_path: Path) -> None:
        copy = tmp_path / "copy.mlpackage"
        shutil.copytree(packages("coreml-ane", None), copy)
        weights = copy / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
        data = weights.read_bytes()
        weights.write_bytes(data[:-2000])
        with pytest.raises(ToolchainError, match="no weights of type"):
            MilProgram(copy)
        weights.unlink()
        with pytest.raises(ToolchainError, match=r"weight\.bin is missing"):
            MilProgram(copy)
        manifest = copy / "Manifest.json"
        manifest.write_text(manifest.read_text().replace("com.apple.CoreML/model.mlmodel", "../../other"))
        with pytest.raises(ToolchainError, match="no model file"):
            MilProgram(copy)
        manifest.write_text(json.dumps({}))
        with pytest.raises(ToolchainError, match="not a package"):
            MilProgram(copy)

    def test_overflow_of_half_precision(self, tmp_path: Path) -> None:
        loud = random_bert()
        with torch.no_grad():
            loud.backbone.encoder.layer[0].intermediate.dense.weight.mul_(3e4)
        path = tmp_path / "loud.mlpackage"
        convert(loud, PROFILES["coreml-ane"], path, ABOUT)
        assert gate(loud, path, mode="float32").cosine_min > MINIMUM_COSINE
        assert "vectors of tasks are not finite" in gate(loud, path).failures


class TestEvaluator:
    def test_takes_its_shapes_only(self, packages: Packages) -> None:
        program = MilProgram(packages("coreml-ane", None))
        with pytest.raises(ToolchainError, match=r"has the shape \(1, 20\)"):
            program.run({"input_ids": np.ones((1, 20), np.int32)})
        with pytest.raises(ToolchainError, match=r"takes the inputs \['input_ids'\]"):
            program.run({"ids": np.ones((1, 16), np.int32)})
        with pytest.raises(ToolchainError, match="takes 128 tokens, got 129"):
            run_package(program)(np.ones((1, 129), np.int64), np.ones((1, 129), np.int64))

    def test_padding_changes_nothing(self, packages: Packages) -> None:
        program = MilProgram(packages("coreml-ane", None))
        ids, _ = padded([16], 16)
        short = program.run({"input_ids": ids.numpy()}, "float32")["embedding"]
        long = program.run({"input_ids": np.pad(ids.numpy(), ((0, 0), (0, 112)))}, "float32")["embedding"]
        assert np.allclose(short, long, atol=1e-5)


class TestResidency:
    def test_the_layout_is_resident(self, packages: Packages) -> None:
        for compression in (None, "int8"):
            residency = measure_residency(MilProgram(packages("coreml-ane", compression)), 32)
            require_resident(residency, transposes=2)
            document = json.loads(json.dumps(residency.document()))
            assert document["share"] == 1.0
            assert document["against"] == {}
            assert document["elsewhere"]["lookup"] == 1
        hidden, inner, tokens, layers = 64, 128, 32, 2
        weights = 4 * hidden * hidden + 2 * hidden * inner
        assert residency.macs == layers * (tokens * weights + 2 * tokens * tokens * hidden)

    def test_the_plain_layout_is_not(self, packages: Packages) -> None:
        residency = measure_residency(MilProgram(packages("coreml-metal", None)), 32)
        assert 0 < residency.share < 0.5
        assert residency.against["rank"] > 0
        assert residency.against["reshape"] > 0
        with pytest.raises(ParityError, match="would fall off the Neural Engine") as caught:
            require_resident(residency, transposes=2)
        assert "transposes in the hot path" in caught.value.report


def test_packages_in_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted, proven, listed by hash, and proven again by verify, out of a zip too."""
    out = tmp_path / "bundle"
    arguments = ["bundle", str(MINILM), "--out", str(out), "--variants", "coreml-ane,fp32", "--quiet"]
    assert main(arguments) == 0
    manifest = json.loads((out / "bundle.json").read_bytes())
    jsonschema.validate(manifest, SCHEMA)
    bundle = Bundle.open(out)
    assert bundle.default_variant == "fp32"
    variant = bundle.variant("coreml-ane")
    assert (variant.runtime, variant.compute_units, variant.lengths) == ("coreml", "CPU_AND_NE", LENGTHS)
    assert variant.minimum_os == "iOS 16, macOS 13"
    assert variant.parity["resident"] == 1
    assert variant.parity["cosine_min"] > MINIMUM_COSINE
    checks = {check.name: check.ok for check in examine(out)}
    assert checks["coreml-ane: files"]
    assert checks["coreml-ane: skipped"]
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", out)
    capsys.readouterr()
    for where in ([archive], [archive, str(MINILM)]):
        assert main(["verify", *where, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["stages"][-1]["stage"] == "coreml-ane"
        assert found["stages"][-1]["cosine_min"] > MINIMUM_COSINE
        assert found["stages"][-1]["resident"] == 1
    weights = out / "coreml-ane.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    with weights.open("r+b") as stream:
        stream.seek(1_000_000)
        stream.write(b"\x00\x01\x02\x03")
    assert not {check.name: check.ok for check in examine(out)}["coreml-ane: files"]
    assert main(["bundle", str(MINILM), "--out", str(tmp_path / "x"), "--variants", "coreml-ane", "--quiet"]) == 1
    assert "Add an ONNX variant" in capsys.readouterr().err


def test_the_shipped_packages() -> None:
    """Whole, within the size that was set for them, and the goldens' vectors come out."""
    folder = MINI / "apple"
    bundle = Bundle.open(folder)
    jsonschema.validate(json.loads((folder / "bundle.json").read_bytes()), SCHEMA)
    assert all(check.ok for check in examine(folder))
    packages = [variant for variant in bundle.variants if variant.runtime == "coreml"]
    assert [(variant.id, variant.compute_units) for variant in packages] == [
        ("coreml-ane-int8", "CPU_AND_NE"),
        ("coreml-metal-int8", "CPU_AND_GPU"),
    ]
    assert sum(variant.bytes for variant in packages) < 50e6
    for variant in packages:
        run = run_package(MilProgram(folder / f"{variant.id}.mlpackage"))
        for golden in bundle.goldens():
            ids = np.array([golden.ids])
            assert float(run(ids, np.ones_like(ids))[0] @ golden.vector) > variant.minimum_cosine, golden.text
