"""A real second provider: OpenVINO, as a package in onnxruntime's place or as a plug-in of it.

`.ci/providers` makes the environments and the bundle, which has the variants fp32, fp16 and int8; elsewhere this is
skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edge import Bundle, Encoder, PlacementError, Provider, Router
from edge.cli import main
from edge.errors import BackendError, ProviderUnavailable
from edge.providers import Candidate, installed
from edge.trial import run_trial
from edge.tune import tune

BUNDLE = os.environ.get("RUVLTRA_TEST_BUNDLE")
if BUNDLE is None:
    pytest.skip("runs in the environments of .ci/providers", allow_module_level=True)
TEXTS = ["Fix the null pointer in the login handler", "write a guide for new hires", "", "déjà vu " * 60]


@pytest.fixture(scope="module")
def several() -> Bundle:
    assert BUNDLE is not None
    return Bundle.open(Path(BUNDLE))


def test_it_is_found_and_says_where_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    rows = installed()
    assert installed() == rows  # having registered plug-ins changes nothing
    (row,) = (row for row in rows if row.name == "openvino")
    assert row.unusable is None
    assert row.source == "built in" or (row.source.startswith("plug-in") and row.hardware[0].startswith("CPU "))
    assert main(["device"]) == 0
    assert f"openvino ({row.source})" in capsys.readouterr().out


def test_a_plug_in_without_hardware_is_explained(several: Bundle) -> None:
    rows = [row for row in installed() if row.name == "webgpu"]
    if not rows:
        pytest.skip("WebGPU's plug-in is not installed here")
    assert rows[0].unusable == "finds no hardware here that it can use"
    with pytest.raises(ProviderUnavailable, match="finds no hardware"):
        Encoder.load(several, device="webgpu")


def test_the_whole_of_fp16_runs_on_it_and_is_right(several: Bundle) -> None:
    encoder = Encoder.load(several, device="openvino", variant="fp16", strict=True)
    assert encoder.placement is not None
    assert encoder.placement.share == 1.0
    assert list(encoder.placement.nodes) == ["OpenVINOExecutionProvider"]
    plain = Encoder.load(several, device="cpu", variant="fp32")
    assert float((encoder.encode(TEXTS) * plain.encode(TEXTS)).sum(1).min()) > 0.999
    again = encoder.encode(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(encoder.encode(TEXTS), again, atol=1e-3)
    decision = Router.load(several, device="OpenVINOExecutionProvider", variant="fp16").route(TEXTS[0])
    assert decision.ranking[0].id == "debugger"


def test_strict_is_proven_or_refused(several: Bundle) -> None:
    placement = Encoder.load(several, device="openvino", variant="fp32").placement
    assert placement is not None
    if placement.share == 1.0:
        Encoder.load(several, device="openvino", variant="fp32", strict=True)
        return
    assert "CPUExecutionProvider" in placement.nodes
    with pytest.raises(PlacementError, match=r"\d+ on OpenVINOExecutionProvider, \d+ on CPUExecutionProvider"):
        Encoder.load(several, device="openvino", variant="fp32", strict=True)


def test_a_graph_that_it_cannot_run_fails_in_a_process_of_its_own(several: Bundle) -> None:
    """int8's operators: 1.24.1 does not load them; the plug-in 1.8.1 dies of an illegal instruction most times."""
    trial = run_trial(several.path, Candidate("int8", "openvino", threads=2))
    if trial.failure is None:
        assert trial.cosine is not None
        assert trial.cosine >= several.variant("int8").minimum_cosine
    else:
        assert "cannot load it for openvino" in trial.failure or "without a result (SIG" in trial.failure


def test_what_it_does_not_know_is_an_error(several: Bundle) -> None:
    if any(row.name == "openvino" and row.package is None for row in installed()):  # the plug-in passes over options
        with pytest.raises(BackendError, match=r"passed over|cannot load|would run on it"):
            Encoder.load(several, device=Provider("openvino", {"device_type": "ABACUS"}), variant="fp16")
    with pytest.raises(BackendError, match=r"passed over|finds no|cannot load"):
        Encoder.load(several, device="openvino:NPU", variant="fp16")


def test_both_are_measured_and_auto_takes_the_faster(several: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    tuning = tune(several, seconds=0.1)
    good = [trial for trial in tuning.trials if trial.failure is None]
    assert {trial.candidate.provider for trial in good} == {"cpu", "openvino"}
    times = {str(t.candidate): float(np.prod([t.p50(tokens, 1) for tokens in (4, 12, 48)]) ** (1 / 3)) for t in good}
    winner = tuning.winners["latency"]
    assert times[str(winner)] <= 1.05 * min(times.values())
    placement = Encoder.load(several).placement
    assert placement is not None
    assert placement.candidate == winner
    assert main(["doctor", str(several.path)]) == 0
    said = capsys.readouterr().out
    assert "best for latency of" in said
    assert "not used: " in said
