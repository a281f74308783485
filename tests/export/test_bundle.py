"""The exporter on real weights: what it writes holds, and what does not hold is not written."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
import torch

from edge import Bundle, Encoder, Router
from edge.doctor import examine
from export.calibrate import Routed
from export.checkpoint import Checkpoint
from export.cli import main
from export.errors import ToolchainError
from export.onnx import operators, quiet
from export.parity import Inputs, Reference, Report, judge, parity_texts, run_graph, run_network
from export.toolchain import check_toolchain
from export.variants import VARIANTS
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
        "--maximum-drop",  # by descriptions alone, untrained, int8 routes some 2 % fewer rightly
        "0.05",
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
        "parity.json",
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
    model = minilm.encoder()
    for text in parity_texts("tasks") + parity_texts("odd"):
        tokens = encoder.tokenize(text)
        with torch.no_grad():
            expected = model(torch.tensor([tokens.ids]), torch.ones(1, len(tokens.ids), dtype=torch.int64))[0].numpy()
        assert float(encoder.encode([text])[0] @ expected) > 0.999999, text


def test_graphs_are_fused_symbolic_and_quantised(exported: Path) -> None:
    fp32 = operators(onnx.load(exported / "model.fp32.onnx"))
    assert (fp32["MultiHeadAttention"], fp32["LayerNormalization"], fp32["BiasGelu"]) == (6, 13, 6)
    int8 = onnx.load(exported / "model.int8.onnx")
    assert (operators(int8)["QAttention"], operators(int8)["Gelu"]) == (6, 6)
    assert operators(int8)["DynamicQuantizeMatMul"] >= 15  # of 18; three down-projections may stay in fp32
    # No masks as large as attention, nothing looked up that is the same for every text.
    assert {"Expand", "Concat", "ReduceSum", "Unsqueeze"} & {*fp32, *operators(int8)} == {"Unsqueeze"}
    assert (fp32["Gather"], operators(int8)["Gather"]) == (1, 2)
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
    assert "int8: too far from the original. No bundle was written" in captured.err
    assert "The error comes in at the stage 'int8'" in captured.err
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.parity.json"]
    stages = json.loads((tmp_path / "bundle.parity.json").read_text())["stages"]
    assert [(stage["stage"], bool(stage["failures"])) for stage in stages] == [
        ("network", False),
        ("fp32", False),
        ("int8", True),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bundle", "nowhere", "--out", "OUT", "--quiet"], "no such folder"),
        (["bundle", str(MINILM), "--out", str(MINI), "--quiet"], "exists already"),
        (["bundle", str(MINILM), "--out", "OUT", "--variants", "int3", "--quiet"], "unknown variant 'int3'"),
        (["bundle", str(MINILM), "--out", "OUT", "--variants", ",", "--quiet"], "no variants"),
        (["bundle", str(MINILM), "--out", "OUT", "--variants", "int8,int8", "--quiet"], "asked for twice"),
        (["bundle", str(MINILM), "--out", "OUT", "--pooling", "cls", "--quiet"], "Leave --pooling out"),
        (["bundle", str(MINILM), "--out", "OUT", "--max-length", "9999", "--quiet"], "choose from 3 to 256"),
        (["bundle", "nowhere", "--out", str(MINI), "--quiet"], "exists already"),
        (["bundle", "nowhere", "--out", "OUT", "--maximum-drop", "nan", "--quiet"], "nan is no share"),
        (["bundle", "nowhere", "--out", "OUT", "--minimum-cosine", "int8=nan"], "nan for int8 is no cosine"),
        (["bundle", "nowhere", "--out", "OUT", "--minimum-cosine", "int3=0.9"], "'int3', which is no variant"),
        (["bundle", "nowhere", "--out", "AGENTS", "--force"], "is a link or a file"),
        (["bundle", str(MINILM), "--out", "OUT", "--task", "sing", "--quiet"], "Use embed, or generate"),
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
    reference = Reference(Inputs.of_checkpoint(minilm), "network", run_network(minilm))
    backend = Encoder.load(exported, variant="fp32")._backend
    bounds = (VARIANTS["fp32"].minimum_cosine, VARIANTS["fp32"].elsewhere)
    assert reference.compare(backend.run, "fp32", *bounds).failures == ()
    blind = reference.compare(lambda ids, mask: backend.run(ids, np.ones_like(mask)), "fp32", *bounds)
    assert any("padded" in failure for failure in blind.failures)
    swapped = reference.compare(lambda ids, mask: backend.run(ids, mask)[::-1], "fp32", *bounds)
    assert any("batch 8" in failure for failure in swapped.failures)
    broken = reference.compare(lambda ids, mask: backend.run(ids, mask) * np.nan, "fp32", *bounds)
    assert len(broken.failures) == 1 + len(broken.grid)
    assert all("not finite" in failure for failure in broken.failures)


def test_every_variant_is_measured_and_the_front_kept(exported: Path, tmp_path: Path) -> None:
    rows = exported.parent / "rows.jsonl"
    out = tmp_path / "auto"
    arguments = ["bundle", str(MINILM), "--out", str(out), "--eval", str(rows), "--variants", "auto", "--quiet"]
    arguments += ["--maximum-drop", "0.05"]
    assert main(arguments) == 0
    jsonschema.validate(json.loads((out / "bundle.json").read_bytes()), SCHEMA)
    assert [check.name for check in examine(out) if not check.ok] == []
    bundle = Bundle.open(out)
    stages = {stage["stage"]: stage for stage in json.loads((out / "parity.json").read_text())["stages"]}
    assert set(stages) == {"network", *VARIANTS}
    kept = {variant.id for variant in bundle.variants}
    assert {"fp32", "int8"} <= kept < set(VARIANTS)
    assert {path.name for path in out.glob("*.onnx")} == {f"model.{name}.onnx" for name in kept}
    card = (out / "CARD.md").read_text()
    assert all(name in card for name in VARIANTS)
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    assert {file.file for file in bundle.documents} == {"parity.json", "CARD.md", "front.png"}
    smaller = {name: stages[name]["bytes"] / stages["fp32"]["bytes"] for name in VARIANTS}
    assert 0.49 < smaller["fp16"] < 0.52
    assert max(smaller[n] for n in ("int8", "int8-weights", "int8-int4-weights", "int4-weights")) < 0.3
    for name in ("fp16", "int8-weights"):  # the precise ones
        assert stages[name]["cosine_min"] > 0.998
    (out / "CARD.md").write_text("other")
    assert [check.name for check in examine(out) if not check.ok] == ["files"]


def test_a_drop_in_accuracy_is_refused(exported: Path) -> None:
    """The gate itself: a variant that decides worse by more than chance."""
    report = Report("int8", "fp32", 1, 1.0, 1.0, 1.0, {"x": 1.0}, ())
    label = np.zeros(1000, dtype=np.int64)

    def judged(wrong: int, drop: float, same: bool = False) -> Report:
        chosen = np.where(np.arange(1000) < wrong, 1, label)
        routed = {"fp32": Routed(label, label), "int8": Routed(chosen, label)}
        return judge(report, routed, "fp32", drop, same)

    assert judged(30, 0.005).failures
    assert not judged(30, 0.05).failures
    assert not judged(4, 0.005).failures
    assert (judged(4, 0.005).accuracy, judged(4, 0.005).agreement) == (0.996, 0.996)
    # Wrong either way, but not the same: nothing lost, and yet not the same decisions. Of 5 expected, chance
    # makes 10 or more in 3 of 100 cases, 9 or more in 7.
    assert not judged(9, 0.005, same=True).failures
    wrong = np.full(1000, 2)
    for elsewhere, same, fails in ((10, True, True), (10, False, False), (9, True, False), (0, True, False)):
        chosen = np.where(np.arange(1000) < elsewhere, 1, wrong)
        routed = {"fp32": Routed(wrong, label), "int8": Routed(chosen, label)}
        assert bool(judge(report, routed, "fp32", 0.005, same).failures) == fails
    assert judge(report, {"fp32": Routed(wrong, label), "int8": Routed(wrong, label)}, "fp32", 0.0, True).failures == ()
    parity = Bundle.open(exported).variant("int8").parity
    assert parity["accuracy"] > 0.3
    assert 0.9 < parity["agreement"] < 1
    assert parity["maximum_drop"] == 0.05


def test_a_bundle_is_verified_again(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(exported), str(MINILM), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in found["stages"]] == ["network", "fp32", "int8"]
    rows = exported.parent / "rows.jsonl"
    for more in ([], [str(MINILM)]):
        assert main(["verify", str(exported), *more, "--eval", str(rows), "--json"]) == 0
        stages = json.loads(capsys.readouterr().out)["stages"]
        recorded = Bundle.open(exported).variant("int8").parity["accuracy"]
        assert {stage["accuracy"] for stage in stages if stage["stage"] == "int8"} == {recorded}
    # Of another checkpoint than it was made of: the vectors differ.
    assert main(["verify", str(exported), str(MINI / "checkpoint")]) == 1
    assert "FAILED: cosine" in capsys.readouterr().out
    # Without an fp32 graph the goldens are held against, from a zip too.
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    archive = shutil.make_archive(str(tmp_path / "mini"), "zip", MINI / "bundle")
    assert main(["verify", archive, "--json"]) == 0
    assert [(s["stage"], s["against"]) for s in json.loads(capsys.readouterr().out)["stages"]] == [("int8", "goldens")]
    (tmp_path / "none.jsonl").write_text('{"task": "bake bread", "agent": "none"}\n')
    assert main(["verify", str(exported), "--eval", str(tmp_path / "none.jsonl")]) == 1
    assert "out of scope" in capsys.readouterr().err
    data = bytearray((copy / "model.int8.bin").read_bytes())
    data[len(data) // 2] ^= 255
    (copy / "model.int8.bin").write_bytes(data)
    assert main(["verify", str(copy)]) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="limits the size of files as a full disk would")
def test_a_full_disk_and_an_interrupt_leave_nothing(tmp_path: Path) -> None:
    """Half-way: the fp32 graph is over the limit, and the interrupt comes once the work folder is there."""
    import resource

    command = [sys.executable, "-m", "export.cli", "bundle", str(MINILM), "--out", str(tmp_path / "out"), "--quiet"]
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000_000, 30_000_000)),
    )
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert full.stderr.startswith("ruvltra-export: ")
    assert list(tmp_path.iterdir()) == []
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, "interrupted" in errors) == (130, True), errors
    assert list(tmp_path.iterdir()) == []


def test_exceptions_of_the_tools_are_named_by_their_stage(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((exported / "model.int8.onnx").read_bytes()[:1000])
    with pytest.raises(ToolchainError, match=r"running model\.onnx failed \(InvalidProtobuf"):
        run_graph(path)
    ids = np.full((1, 3), 10**6)
    with pytest.raises(ToolchainError, match=r"running model\.int8\.onnx failed.*leave the variant out"):
        run_graph(exported / "model.int8.onnx")(ids, np.ones_like(ids))
    with pytest.raises(OSError, match="no space"), quiet("a stage"):  # the user's to mend, and said so
        raise OSError("no space")


def test_an_untested_tool_is_named_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.0.0" if name == "transformers" else real(name))
    with pytest.raises(ToolchainError, match=r"transformers 5.0.0 is installed.*transformers==4.57.6"):
        check_toolchain()
