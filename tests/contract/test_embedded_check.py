"""scripts/embedded-check: what of it needs no emulator."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import MINI, ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("embedded_check", str(ROOT / "scripts" / "embedded-check"))
    spec = importlib.util.spec_from_loader("embedded_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_what_does_not_hold_is_named(script: ModuleType) -> None:
    here = {
        "name": "b",
        "bound": 0.9,
        "agents": ["coder", "tester"],
        "vectors": [[1.0, 0.0], [0.0, 1.0]],
        "goldens": [[1.0, 0.0]],
        "ids": [[1, 2], [3]],
    }
    assert list(script.differences(here, here)) == []
    assert list(script.differences(here, here | {"agents": ["coder", None]})) == ["b: decisions"]
    assert list(script.differences(here, here | {"ids": [[1, 2], [4]]})) == ["b: token ids"]
    assert list(script.differences(here, here | {"vectors": [[1.0, 0.0], [0.6, 0.8]]})) == [
        "b: cosine 0.80000 below 0.9"
    ]
    nothing = here | {"vectors": [[1.0, 0.0], [float("nan"), 1.0]]}
    assert list(script.differences(here, nothing)) == ["b: cosine -1.00000 below 0.9"]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's own files")
def test_memory_and_decisions_of_this_machine(script: ModuleType) -> None:
    """As of the other one: the program, and the memory that it holds when it is done."""
    python = ["env", f"PYTHONPATH={ROOT}", sys.executable]
    tasks = json.dumps(script.TASKS)
    bundle = MINI / "bundle"
    found = json.loads(script.run([*python, "-c", script.PROGRAM, "compare", str(bundle), tasks]))
    assert len(found["agents"]) == 20 == len(set(script.TASKS))
    assert list(script.differences(found, found)) == []
    more, code = script.difference(python, bundle, tasks)
    assert 10 < more < 200
    assert code == 0


def test_it_refuses_what_it_cannot_do(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert script.main(["--work", str(tmp_path)]) == 2
    assert "needs Linux on x86-64" in capsys.readouterr().err
    with pytest.raises(script.Refusal, match="status 3"):
        script.run([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(script.Refusal, match="without a result"):
        script.resident([sys.executable, "-c", "pass", "--"], "imports")
