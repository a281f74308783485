"""scripts/mac-verify: what needs no Mac, and its course with a double of Core ML's compiler, predictor and planner.

The double predicts by the evaluator on the shipped packages, so that ids, padding and vectors are real; its times and
plans mean nothing. The file in tests/data is made up, and says so.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import coremltools
import jsonschema
import numpy as np
import pytest
from coremltools.models import compute_plan

from edge import Bundle
from edge.bundle import Golden
from export.mil import MilProgram
from tests.conftest import MINI, ROOT

APPLE = MINI / "apple"
SCHEMA = json.loads((ROOT / "docs" / "residency.schema.json").read_text("utf-8"))
MADE_UP = ROOT / "tests" / "data" / "residency-made-up.json"
COMPILED, PLAN = coremltools.models.CompiledMLModel, compute_plan.MLComputePlan


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("mac_verify", str(ROOT / "scripts" / "mac-verify"))
    spec = importlib.util.spec_from_loader("mac_verify", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mac_verify"] = module
    loader.exec_module(module)
    return module


class Mac:
    """Core ML's compiler, predictor and planner, called as coremltools' own functions would let them be."""

    def __init__(self) -> None:
        self.hints: list[dict[str, Any] | None] = []
        self.lengths: set[int] = set()
        self.scale = 1.0  # of the vectors
        self.refuses: str | None = None  # compute units that do not load
        self.plans = True

    def compile_model(self, model: str, destination_path: str) -> str:
        shutil.copytree(model, destination_path)
        return destination_path

    def load(self, *arguments: Any, **named: Any) -> Any:
        given = inspect.signature(COMPILED.__init__).bind(None, *arguments, **named).arguments
        if given["compute_units"].name == self.refuses:
            raise RuntimeError("Error binding, as on some Macs")
        self.hints.append(given["optimization_hints"])
        program = MilProgram(Path(given["path"]))
        return SimpleNamespace(predict=lambda inputs: self.predict(program, inputs))

    def predict(self, program: MilProgram, inputs: dict[str, Any]) -> dict[str, Any]:
        assert inputs["input_ids"].dtype == np.int32
        self.lengths.add(inputs["input_ids"].shape[1])
        return {name: self.scale * vector for name, vector in program.run(inputs).items()}

    def load_plan(self, *arguments: Any, **named: Any) -> Any:
        inspect.signature(PLAN.load_from_path).bind(*arguments, **named)
        if not self.plans:
            raise RuntimeError("MLComputePlan is only available on macOS >= 14.4")
        devices = {name: type(name, (), {})() for name in ("MLCPUComputeDevice", "MLNeuralEngineComputeDevice")}
        kinds = [("const", None, 0.0), ("ios16.gather", "MLCPUComputeDevice", 0.1), ("ios16.cast", None, None)]
        kinds += 2 * [("ios16.conv", "MLNeuralEngineComputeDevice", 0.45)]
        operations = [
            SimpleNamespace(operator_name=kind, blocks=[], said=(device, cost)) for kind, device, cost in kinds
        ]
        functions = {"main": SimpleNamespace(block=SimpleNamespace(operations=operations))}

        def usage(operation: Any) -> Any:
            device = operation.said[0]
            return None if device is None else SimpleNamespace(preferred_compute_device=devices[device])

        def cost(operation: Any) -> Any:
            return None if operation.said[1] is None else SimpleNamespace(weight=operation.said[1])

        return SimpleNamespace(
            model_structure=SimpleNamespace(program=SimpleNamespace(functions=functions)),
            get_compute_device_usage_for_mlprogram_operation=usage,
            get_estimated_cost_for_mlprogram_operation=cost,
        )


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, script: ModuleType) -> Iterator[Mac]:
    double = Mac()
    monkeypatch.setattr(coremltools.models.utils, "compile_model", double.compile_model)
    monkeypatch.setattr(coremltools.models, "CompiledMLModel", double.load)
    monkeypatch.setattr(compute_plan.MLComputePlan, "load_from_path", double.load_plan)
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(script, "_sysctl", {"machdep.cpu.brand_string": "No Chip", "hw.model": "Double1,2"}.get)
    monkeypatch.setattr(script, "UNITS", ("CPU_AND_NE", "ALL"))
    monkeypatch.setattr(script, "WARM_UP", 0)
    return double


@pytest.fixture
def ane(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped bundle, of whose packages one is looked at."""
    if not APPLE.exists():
        pytest.skip("a source distribution has no CoreML packages")
    opened = Bundle.open(APPLE)
    opened.variants = tuple(variant for variant in opened.variants if variant.id != "coreml-metal-int8")
    monkeypatch.setattr(Bundle, "open", lambda _: opened)
    return APPLE


def test_a_run_is_written_and_printed(
    script: ModuleType, mac: Mac, ane: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(ane), "--out", str(tmp_path), "--repeats", "2"], script.CoreML()) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "residency-no-chip-double1-2.json"
    document = json.loads(path.read_text("utf-8"))
    jsonschema.validate(document, SCHEMA)
    assert document["bundle"]["id"] == Bundle.open(ane).id
    assert (document["macos"], document["tools"]["coremltools"], document["passed"]) == ("15.1", "9.0", True)
    (variant,) = document["variants"]
    runs = [(run["compute_units"], run["reshape_frequency"]) for run in variant["runs"]]
    assert runs == [(units, often) for units in ("CPU_AND_NE", "ALL") for often in ("frequent", "infrequent")]
    assert mac.hints[::2] == 2 * [None, {"reshapeFrequency": coremltools.ReshapeFrequency.Infrequent}]
    assert mac.hints[1::2] == mac.hints[::2]  # each is loaded twice
    assert mac.lengths == {16, 32, 64, 128}
    for run in variant["runs"]:
        assert run["error"] is None
        assert (run["goldens"]["count"], run["goldens"]["too_long"], run["goldens"]["tokens_equal"]) == (20, 0, True)
        assert variant["minimum_cosine"] <= run["goldens"]["cosine_min"] <= run["goldens"]["cosine_mean"] <= 1
        assert [p["tokens"] for p in run["prediction"]] == [16, 32, 64, 128]
    assert variant["plan_tokens"] == 128
    assert variant["plans"][0]["operations"] == {"cpu": 1, "gpu": 0, "neural_engine": 2, "unknown": 1}
    said = capsys.readouterr().out
    assert "coreml-ane-int8, made for CPU_AND_NE: passed" in said
    assert "| CPU_AND_NE | 1 (10.0%) | 0 | 2 (90.0%) | 1 (0.0%) |" in said
    assert said.endswith(f"{path}: written; commit it\n")


def test_what_fails_is_written_down_too(
    script: ModuleType, mac: Mac, ane: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mac.refuses, mac.plans, mac.scale = "ALL", False, 1.02
    assert script.main([str(ane), "--out", str(tmp_path), "--repeats", "2"], script.CoreML()) == 1
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text("utf-8"))
    jsonschema.validate(document, SCHEMA)
    runs = document["variants"][0]["runs"]
    assert runs[0]["goldens"]["length_min"] > 1.01  # which no vector of unit length has
    assert [run["error"] for run in runs] == 2 * [None] + 2 * ["Error binding, as on some Macs"]
    assert not any(run["passed"] for run in runs)
    assert "macOS >= 14.4" in document["variants"][0]["plans"][0]["error"]
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.usefixtures("mac")
def test_a_package_that_does_not_compile(
    script: ModuleType, ane: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("compiler error")

    monkeypatch.setattr(coremltools.models.utils, "compile_model", fails)
    assert script.main([str(ane), "--out", str(tmp_path)], script.CoreML()) == 1
    document = json.loads(next(tmp_path.iterdir()).read_text("utf-8"))
    jsonschema.validate(document, SCHEMA)
    assert document["variants"][0]["error"] == "compiler error"


@pytest.mark.usefixtures("mac")
def test_older_systems_get_no_hint(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.mac_ver", lambda: ("14.7.1", ("", "", ""), "arm64"))
    assert script.CoreML().frequencies == ("frequent",)


def test_lengths_and_padding(script: ModuleType) -> None:
    assert [script.smallest((16, 32, 64, 128), tokens) for tokens in (1, 16, 17, 128)] == [16, 16, 32, 128]
    with pytest.raises(ValueError, match="129 tokens"):
        script.smallest((16, 128), 129)
    padded = script.pad([5, 6], 4, 9)
    assert (padded.tolist(), padded.dtype) == ([[5, 6, 9, 9]], np.int32)
    assert script.fill([5, 6, 7], 5).tolist() == [[5, 6, 7, 5, 6]]


def test_statistics(script: ModuleType) -> None:
    assert script.spread([0.001 * i for i in range(100, -1, -1)]) == {"n": 101, "p50_ms": 50.0, "p95_ms": 95.0}
    goldens = [Golden("a", (1,), np.array([1, 0], np.float32)), Golden("b", (1,), np.array([0, 1], np.float32))]
    near = {"tokens_equal": True, **script.compare(np.array([[1.001, 0], [0.6, 0.8]], np.float32), goldens)}
    assert (near["cosine_min"], near["cosine_mean"], near["length_max"]) == (0.8, 0.9, 1.001)
    assert script.meets(near, 0.8)
    assert not script.meets(near, 0.81)
    assert not script.meets(near | {"tokens_equal": False}, 0.8)
    assert not script.meets(near | {"length_min": 0.98}, 0.8)
    broken = {"tokens_equal": True, **script.compare(np.array([[np.nan, 0], [0, 1]], np.float32), goldens)}
    assert broken["cosine_min"] is None
    assert not script.meets(broken, -1.0)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        script.compare(np.ones((2, 3), np.float32), goldens)


def test_a_plan_is_counted(script: ModuleType) -> None:
    plan = [("const", None, 0.0), ("conv", "neural_engine", 0.5), ("conv", "gpu", 0.25), ("cast", "cpu", None)]
    counted = script.count(script.Operation(*row) for row in plan)
    assert counted["operations"] == {"cpu": 1, "gpu": 1, "neural_engine": 1, "unknown": 0}
    assert counted["cost"] == {"cpu": 0.0, "gpu": 0.25, "neural_engine": 0.5, "unknown": 0}
    assert counted["kinds"] == {"cast": {"cpu": 1}, "conv": {"gpu": 1, "neural_engine": 1}}


def test_the_made_up_file(script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document = json.loads(MADE_UP.read_text("utf-8"))
    jsonschema.validate(document, SCHEMA)
    assert document["made_up"] is True
    assert script.main(["--show", str(MADE_UP)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MADE UP, not measured: ")
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert set(tables) == {8 + 2, 6}  # two lengths
    assert sum("FAILED" in line for line in lines) == 2
    for key in SCHEMA["required"]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({k: v for k, v in document.items() if k != key}, SCHEMA)
    for wrong in ('{"format": 2}', "{", '{"format": 1, "made_up": false}'):
        (tmp_path / "wrong.json").write_text(wrong)
        assert script.main(["--show", str(tmp_path / "wrong.json")]) == 2
    with pytest.raises(script.Refusal, match=r"does not fit residency\.schema\.json at \$"):
        script.write(document | {"date": "today"}, tmp_path / "residency-x.json")
    script.write(document, tmp_path / "residency-x.json")
    assert {path.name for path in tmp_path.iterdir()} == {"wrong.json", "residency-x.json"}
    assert json.loads((tmp_path / "residency-x.json").read_text("utf-8")) == document


def test_it_says_what_it_needs(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if platform.system() != "Darwin":
        command = [sys.executable, str(ROOT / "scripts" / "mac-verify"), str(MINI / "bundle")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.endswith(f"needs macOS, since CoreML runs nowhere else (this is {platform.system()})\n")
        assert done.stderr.count("\n") == 1
    for arguments, complaint in (
        ([str(tmp_path / "none")], "is no folder"),
        ([str(MINI / "bundle"), "--out", str(tmp_path / "none")], "no folder to write to"),
        ([str(MINI / "bundle")], "has no CoreML packages"),
    ):
        assert script.main(arguments, script.CoreML()) == 2
        assert complaint in capsys.readouterr().err
    assert script.main([str(tmp_path)], script.CoreML()) == 1  # no bundle there
    for wrong in ([], ["bundle", "--show", "file"], ["bundle", "--repeats", "1"]):
        with pytest.raises(SystemExit) as stop:
            script.main(wrong)
        assert stop.value.code == 2
