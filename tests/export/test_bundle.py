"""The exporter on real weights: what it writes holds, and what does not hold is not written."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
import torch

from edge import Bundle, Encoder, Router
from edge.doctor import examine
from export.checkpoint import Checkpoint
from export.cli import main
from export.onnx import operators
from export.parity import MINIMUM_COSINE, Reference, parity_texts
from export.wrapper import SentenceEncoder
from tests.conftest import MINI, ROOT
from tests.export.conftest import MINILM

SCHEMA = json.loads((ROOT / "docs" / "bundle.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    rows = [json.loads(line) for line in (MINI / "splits" / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::8]))
    arguments = [
        "bundle",
        str(MINILM),
        "--out",
        str(folder / "bundle"),
        "--eval",
        str(folder / "rows.jsonl"),
        "--quiet",
    ]
    assert main(arguments) == 0
    return folder / "bundle"


def test_it_holds_what_the_format_says(exported: Path) -> None:
    files = {path.name for path in exported.iterdir()}
    assert files == {
        "bundle.json",
        "bundle.json.sha256",
        "agents.json",
        "goldens.json",
        "tokenizer.json",
        "model.fp32.bin",
        "model.fp32.onnx",
        "model.int8.bin",
        "model.int8.onnx",
    }
    for folder in (exported, MINI / "bundle"):
        jsonschema.validate(json.loads((folder / "bundle.json").read_bytes()), SCHEMA)
    assert [check.name for check in examine(exported) if not check.ok] == []
    # The work folder is gone.
    assert {path.name for path in exported.parent.iterdir()} == {"bundle", "rows.jsonl"}


def test_the_schema_refuses_what_is_wrong(exported: Path) -> None:
    manifest = json.loads((exported / "bundle.json").read_bytes())
    for key in SCHEMA["required"]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({k: v for k, v in manifest.items() if k != key}, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest | {"format": 2}, SCHEMA)


def test_fp32_vectors_equal_torch_for_every_text(exported: Path, minilm: Checkpoint) -> None:
    encoder = Encoder.load(exported, variant="fp32")
    model = SentenceEncoder(minilm.backbone)
    for text in parity_texts("tasks") + parity_texts("odd"):
        tokens = encoder.tokenize(text)
        with torch.no_grad():
            expected = model(torch.tensor([tokens.ids]), torch.ones(1, len(tokens.ids), dtype=torch.int64))[0].numpy()
        assert float(encoder.encode([text])[0] @ expected) > 0.999999, text


def test_graphs_are_fused_symbolic_and_quantised(exported: Path) -> None:
    fp32 = operators(onnx.load(exported / "model.fp32.onnx"))
    assert (fp32["MultiHeadAttention"], fp32["SkipLayerNormalization"], fp32["BiasGelu"]) == (6, 12, 6)
    int8 = onnx.load(exported / "model.int8.onnx")
    assert operators(int8)["DynamicQuantizeMatMul"] + operators(int8)["MatMulIntegerToFloat"] >= 33
    assert [dim.dim_param for value in int8.graph.input for dim in value.type.tensor_type.shape.dim] == [
        "batch",
        "tokens",
    ] * 2
    sizes = {path.suffixes[0]: path.stat().st_size for path in exported.glob("*.bin")}
    assert sizes[".int8"] < 0.35 * sizes[".fp32"]


def test_any_batch_and_length_runs_in_fp32(exported: Path) -> None:
    encoder = Encoder.load(exported, variant="fp32")
    for batch, tokens in ((1, 1), (1, 256), (3, 5), (8, 17)):
        ids = np.full((batch, tokens), 2000, dtype=np.int64)
        assert encoder._backend.run(ids, np.ones_like(ids)).shape == (batch, 384)


def test_calibration_is_fitted_and_recorded(exported: Path) -> None:
    bundle = Bundle.open(exported)
    rows = (exported.parent / "rows.jsonl").read_text("utf-8").splitlines()
    for variant in bundle.variants:
        assert variant.calibrated_on == f"rows.jsonl, {len(rows)} tasks"
        assert variant.calibration["custom"]["embedding"].cosine > 1
    assert bundle.head is None
    decision = Router.load(exported).route("Write unit tests for the parser")
    assert decision.ranking[0].id == "tester"


def test_a_missed_bound_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    arguments = ["bundle", str(MINILM), "--out", str(out), "--quiet", "--minimum-cosine", "int8=0.9999"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "FAILED: cosine" in captured.err
    assert "int8: too far from the original. Nothing was written" in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bundle", "nowhere", "--out", "OUT", "--quiet"], "no such folder"),
        (["bundle", str(MINILM), "--out", str(MINI), "--quiet"], "exists already"),
        (["bundle", str(MINILM), "--out", "OUT", "--variants", "int3", "--quiet"], "unknown variant 'int3'"),
        (["bundle", str(MINILM), "--out", "OUT", "--variants", ",", "--quiet"], "no variants"),
        (["bundle", str(MINI / "checkpoint"), "--out", "OUT", "--agents", "AGENTS", "--quiet"], "head was trained for"),
        (["finetune", "nowhere.toml"], "no such recipe"),
        (["finetune", str(MINI / "recipe.toml"), "--out", "OUT"], "--commits"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "agents.toml").write_text('[[agents]]\nname = "only"\ndescription = "x"\n')
    places = {"OUT": str(tmp_path / "out"), "AGENTS": str(tmp_path / "agents.toml")}
    assert main([places.get(argument, argument) for argument in arguments]) == 1
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["agents.toml"]


def test_parity_catches_a_graph_that_ignores_the_mask(minilm: Checkpoint, exported: Path) -> None:
    """The comparison itself: three faults that a real exporter could have."""
    reference = Reference(minilm, SentenceEncoder(minilm.backbone).eval())
    backend = Encoder.load(exported, variant="fp32")._backend
    bound = MINIMUM_COSINE["fp32"]
    assert reference.compare(backend.run, "fp32", bound).failures == ()
    blind = reference.compare(lambda ids, mask: backend.run(ids, np.ones_like(mask)), "fp32", bound)
    assert any("padded" in failure for failure in blind.failures)
    swapped = reference.compare(lambda ids, mask: backend.run(ids, mask)[::-1], "fp32", bound)
    assert any("batch 8" in failure for failure in swapped.failures)
    broken = reference.compare(lambda ids, mask: backend.run(ids, mask) * np.nan, "fp32", bound)
    assert len(broken.failures) == 1 + len(broken.grid)
