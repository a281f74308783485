"""The runtime's CoreML back end, with a double of Core ML's compiler and predictor alone.

The double is fed by the evaluator on a real package, so that ids, padding, masks and vectors are real.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from edge import Bundle, Encoder, Router
from edge.coreml import CoreMLBackend
from edge.device import CACHE
from edge.doctor import examine
from edge.errors import BackendError, ChecksumError, ManifestError, MissingExtra, OutputError, ProviderUnavailable
from export.bundle import Identity, build_bundle
from export.checkpoint import Checkpoint
from export.mil import MilProgram
from export.parity import parity_texts, run_network
from tests.export.conftest import MINILM


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(9)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=160,
        initializer_range=0.2,
    )
    config._attn_implementation = "eager"
    tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    network = BertModel(config, add_pooling_layer=False).eval()
    for name, value in network.named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):  # not as they start
            value.data += 0.2 * torch.randn(value.shape)
    return Checkpoint(MINILM, network, tokenizer, 160, None)


@pytest.fixture(scope="module")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coreml") / "bundle"
    build_bundle(
        checkpoint,
        out,
        identity=Identity("small", "1", "Apache-2.0", "random"),
        agents=list(Bundle.open().agents),
        variants=("fp32", "coreml-ane"),
        quiet=True,
    )
    return out


class Compiler:
    """Core ML's compiler and predictor: copies a package, and predicts by the evaluator."""

    def __init__(self) -> None:
        self.compiled = 0
        self.lengths: list[int] = []
        self.units: list[str] = []

    def compile_model(self, model: str, destination_path: str) -> str:
        self.compiled += 1
        shutil.copytree(model, destination_path)
        return destination_path

    def load(self, path: str, compute_units: coremltools.ComputeUnit) -> Compiler.Model:
        self.units.append(compute_units.name)
        return Compiler.Model(self, MilProgram(Path(path)))

    class Model:
        def __init__(self, compiler: Compiler, program: MilProgram) -> None:
            self._compiler, self._program = compiler, program

        def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
            self._compiler.lengths.append(inputs["input_ids"].shape[1])
            return self._program.run(inputs)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compiler]:
    compiler = Compiler()
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(coremltools.models.utils, "compile_model", compiler.compile_model)
    monkeypatch.setattr(coremltools.models, "CompiledMLModel", compiler.load)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return compiler


def test_vectors_are_the_networks(mac: Compiler, exported: Path, checkpoint: Checkpoint) -> None:
    encoder = Encoder.load(exported, variant="coreml-ane")
    network = run_network(checkpoint)
    assert encoder.max_length == 128
    texts = [*parity_texts("tasks"), *parity_texts("odd"), "word " * 300]
    for text in texts:
        ids = np.array([encoder.tokenize(text).ids])
        assert float(encoder.encode([text])[0] @ network(ids, np.ones_like(ids))[0]) > 0.999, text
    shapes = sorted({len(encoder.tokenize(text).ids) for text in texts})
    assert set(mac.lengths) == {min(n for n in (16, 32, 64, 128) if n >= length) for length in shapes}
    assert mac.units == ["CPU_AND_NE"]
    assert Router.load(exported, variant="coreml-ane").route("Fix the login").ranking


def test_a_batch_is_run_row_by_row(mac: Compiler, exported: Path) -> None:
    bundle = Bundle.open(exported)
    backend = CoreMLBackend(bundle, bundle.variant("coreml-ane"), device="cpu")
    assert mac.units == ["CPU_ONLY"]
    ids = np.array([[101, 2000, 2001, 102], [101, 3000, 102, 0]])
    both = backend.run(ids, (ids != 0).astype(np.int64))
    for row, vector in zip(([101, 2000, 2001, 102], [101, 3000, 102]), both, strict=True):
        one = np.array([row])
        np.testing.assert_array_equal(backend.run(one, np.ones_like(one))[0], vector)
    with pytest.raises(BackendError, match="takes 128 tokens, not 129"):
        backend.run(np.ones((1, 129), np.int64), np.ones((1, 129), np.int64))


def test_lengths_are_those_of_half_precision(mac: Compiler, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(exported)
    backend = CoreMLBackend(bundle, bundle.variant("coreml-ane"))
    ids = np.array([[101, 2000, 102]])
    expected = backend.run(ids, np.ones_like(ids))
    predict = Compiler.Model.predict

    def scaled(scale: float) -> None:
        def run(model: Compiler.Model, inputs: dict[str, Any]) -> dict[str, Any]:
            return {name: np.float32(scale) * vector for name, vector in predict(model, inputs).items()}

        monkeypatch.setattr(Compiler.Model, "predict", run)

    for scale in (0.999, 1.001):  # squared, further off than a unit vector may be
        scaled(scale)
        np.testing.assert_allclose(backend.run(ids, np.ones_like(ids)), expected, atol=1e-6)
    for scale in (0.0, 0.97, 1.03, np.nan, np.inf):
        scaled(scale)
        with pytest.raises(OutputError, match="not finite and of unit length"):
            backend.run(ids, np.ones_like(ids))
    assert mac.compiled == 1


def test_a_package_is_compiled_once(mac: Compiler, exported: Path, tmp_path: Path) -> None:
    expected = Encoder.load(exported, variant="coreml-ane").encode(["Fix the login"])
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", exported)
    np.testing.assert_array_equal(Encoder.load(archive, variant="coreml-ane").encode(["Fix the login"]), expected)
    assert mac.compiled == 1  # the zip has the same content
    (kept,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(kept / "Data")
    np.testing.assert_array_equal(Encoder.load(exported, variant="coreml-ane").encode(["Fix the login"]), expected)
    assert mac.compiled == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [kept.name]


def test_eight_threads(mac: Compiler, exported: Path) -> None:
    encoder = Encoder.load(exported, variant="coreml-ane")
    texts = parity_texts("tasks")[:16]
    expected = encoder.encode(texts)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: encoder.encode([text])[0], texts))
    np.testing.assert_array_equal(np.stack(found), expected)
    assert len(mac.lengths) == 33  # the golden at the start, and twice sixteen


def test_doctor_examines_packages_where_they_run(mac: Compiler, exported: Path) -> None:
    checks = {check.name: check for check in examine(exported)}
    assert all(check.ok for check in checks.values()), checks
    assert "coreml-ane: vectors" in checks
    assert mac.compiled == 1


def test_changed_files_are_refused(mac: Compiler, exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    weights = copy / "coreml-ane.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    with weights.open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"\x07\x07")
    with pytest.raises(ChecksumError, match=r"weight\.bin"):
        Encoder.load(copy, variant="coreml-ane")
    assert mac.compiled == 0


def test_what_core_ml_refuses_is_named(mac: Compiler, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Error compiling model: no such operation")

    monkeypatch.setattr(coremltools.models.utils, "compile_model", fails)
    with pytest.raises(BackendError, match=r"no such operation.*iOS 16, macOS 13 or later; use an onnx variant"):
        Encoder.load(exported, variant="coreml-ane")
    assert mac.compiled == 0


def test_elsewhere_and_without_the_extra(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProviderUnavailable, match="device 'gpu'"):
        Encoder.load(exported, variant="coreml-ane", device="gpu")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    with pytest.raises(ProviderUnavailable, match=r"runs on macOS and not on Linux. Use an onnx variant"):
        Encoder.load(exported, variant="coreml-ane")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"pip install 'ruvltra-edge\[coreml\]'"):
        Encoder.load(exported, variant="coreml-ane")


def test_a_manifest_without_what_a_package_needs(mac: Compiler, exported: Path) -> None:
    bundle = Bundle.open(exported)
    for lacking in ({"padding_id": None}, {"lengths": ()}, {"compute_units": None}, {"package": None}):
        with pytest.raises(ManifestError, match="Export it again"):
            CoreMLBackend(bundle, replace(bundle.variant("coreml-ane"), **lacking))
    assert mac.compiled == 0
