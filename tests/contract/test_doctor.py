"""Doctor finds what hashes cannot: a bundle that is whole and wrong."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edge.trees
from edge.bundle import MANIFEST, MANIFEST_DIGEST, manifest_digest
from edge.doctor import TESTED, Check, examine, examine_device
from tests.conftest import MINI, ROOT


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI / "bundle", tmp_path / "bundle"))


def reseal(folder: Path, file: str) -> None:
    """Put the file's new hash into the manifest, as an exporter with a fault in it would."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    data = (folder / file).read_bytes()
    for entry in (*manifest["variants"], *(manifest[key] for key in ("tokenizer", "agents", "goldens"))):
        if entry["file"] == file:
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_DIGEST).write_bytes(manifest_digest(content))


def failures(folder: Path) -> list[str]:
    return [check.name for check in examine(folder) if not check.ok]


def test_a_healthy_bundle_passes(copy: Path) -> None:
    assert failures(copy) == []


def test_the_device_is_examined(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {check.name: check for check in examine_device(copy)}
    assert all(check.ok for check in checks.values())
    assert {"device", "onnxruntime", "versions", "placement", "time, cold", "time, warm", "memory"} <= checks.keys()
    assert "operations on CPUExecutionProvider" in checks["placement"].detail
    assert re.fullmatch(r"Annoy finds (9[5-9]|100)\.\d% of the nearest of 600 vectors .*", checks["index"].detail)
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    assert sorted(stated) == sorted(f"{name}>={low},<{high}" for name, (low, high) in TESTED.items())
    assert checks["versions"].detail.startswith("tested: ")
    monkeypatch.setitem(TESTED, "numpy", ("1.0", "1.1"))
    checks = {check.name: check for check in examine_device(copy)}
    assert checks["versions"].detail.startswith("not tested with numpy ")


def test_an_annoy_that_is_broken_or_missing_is_said(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def index() -> Check:
        return next(check for check in examine_device(copy) if check.name == "index")

    monkeypatch.setattr(edge.trees, "fault", lambda *_: "its distances are wrong")
    assert not index().ok
    assert "its distances are wrong. Compile it here" in index().detail
    monkeypatch.setitem(sys.modules, "annoy", None)
    assert index().ok
    assert "ruvltra-edge[annoy]" in index().detail


def test_two_packages_of_onnxruntime_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "onnxruntime_gpu-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    checks = {check.name: check for check in examine_device(MINI / "bundle")}
    assert not checks["onnxruntime"].ok
    assert "onnxruntime-gpu 1.2.3: they overwrite each other's files" in checks["onnxruntime"].detail


def test_a_wrong_weight_is_found(copy: Path) -> None:
    path = copy / "model.int8.onnx"
    graph = onnx.load(path)
    weight = max(
        (i for i in graph.graph.initializer if i.data_type == onnx.TensorProto.INT8), key=lambda i: len(i.raw_data)
    )
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=0), weight.name))
    onnx.save(graph, path)
    reseal(copy, path.name)
    assert "int8: vectors" in failures(copy)


def test_a_wrong_tokenizer_is_found(copy: Path) -> None:
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["fix"], vocabulary["write"] = vocabulary["write"], vocabulary["fix"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    reseal(copy, path.name)
    assert "int8: tokens" in failures(copy)


def test_a_model_that_is_no_model_is_found(copy: Path) -> None:
    (copy / "model.int8.onnx").write_bytes(b"not a graph")
    reseal(copy, "model.int8.onnx")
    assert failures(copy) == ["int8: failed"]
