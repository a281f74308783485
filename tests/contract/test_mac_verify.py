"""What of scripts/mac-verify needs no Mac. The file in tests/data is made up, and says so: no Mac has run it yet."""

from __future__ import annotations

import json
import platform
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.conftest import MINI, ROOT

SCHEMA = json.loads((ROOT / "docs" / "residency.schema.json").read_text("utf-8"))
MADE_UP = ROOT / "tests" / "data" / "residency-made-up.json"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "mac-verify"), run_name="mac_verify")


def test_the_made_up_file_fits_the_schema_and_prints_as_a_table(script: dict[str, Any]) -> None:
    document = json.loads(MADE_UP.read_text("utf-8"))
    jsonschema.validate(document, SCHEMA)
    assert document["made_up"] is True
    lines = script["table"](document).splitlines()
    assert "a made-up Mac" in lines[0]
    assert "neural engine 98%" in lines[2]
    assert "BELOW" not in lines[2]
    assert lines[3].endswith("BELOW ITS BOUND")
    for key in SCHEMA["required"]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({k: v for k, v in document.items() if k != key}, SCHEMA)


def test_a_plan_is_summed_up(script: dict[str, Any]) -> None:
    plan = [
        ("const", None, None),
        ("gather", "cpu", 0.1),
        ("conv", "neural engine", 0.6),
        ("conv", "neural engine", 0.25),
        ("cast", "gpu", None),
    ]
    assert script["residency"](plan) == {
        "operations": {"neural engine": 2, "cpu": 1, "gpu": 1},
        "cost": {"neural engine": 0.85, "cpu": 0.1, "gpu": 0.0},
        "off_the_neural_engine": {"gather": 1, "cast": 1},
    }


def test_times_and_the_file(script: dict[str, Any], tmp_path: Path) -> None:
    assert script["percentiles"]([0.001 * i for i in range(100, 0, -1)]) == {"p50_ms": 50.5, "p95_ms": 95.0}
    assert script["percentiles"]([0.002]) == {"p50_ms": 2.0, "p95_ms": 2.0}
    script["write"](tmp_path / "x.json", {"a": 1})
    assert [(p.name, json.loads(p.read_text())) for p in tmp_path.iterdir()] == [("x.json", {"a": 1})]


def test_it_says_what_it_needs(tmp_path: Path) -> None:
    def run(bundle: Path) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "scripts" / "mac-verify"), str(bundle)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert run(tmp_path)[0] == 2
    status, said = run(MINI / "bundle")
    assert (status, "no folder of a bundle with CoreML packages" in said) == (2, True)
    apple = MINI / "apple"
    if apple.exists() and platform.system() != "Darwin":
        assert run(apple) == (2, f"mac-verify: needs macOS; this is {platform.system()}.\n")
