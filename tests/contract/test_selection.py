"""What runs a bundle is chosen by evidence: wrong, crashing and hanging back ends are dropped, and said to be.

The stand-ins are back ends of a package on the path, found as users' own would be; what they stand in for is a
provider's fault. Everything else is real: processes, ONNX Runtime, the shipped bundle. Providers that this machine
lacks are made-up lists.
"""

from __future__ import annotations

import importlib
import json
import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edge import Bundle, Encoder, Router
from edge.choice import TUNING, Wish, policy
from edge.cli import main
from edge.device import cache_folder
from edge.errors import BackendError, EdgeWarning, InputError, OutputError, PlacementError, ProviderUnavailable
from edge.providers import KNOWN, Candidate, Installed, Known, Provider, find, options_of
from edge.session import OnnxBackend, Placement
from edge.trial import Timing, Trial, run_trial
from edge.tune import Tuning, _keep, candidates, kept, prove, tune
from tests.conftest import MINI

STAND_INS = '''
"""Back ends with one fault each."""
import os
import time

import numpy as np

from edge.session import OnnxBackend


class Good:
    def __init__(self, bundle, variant, candidate):
        self.dim = bundle.encoder.dim
        self._onnx = OnnxBackend(bundle, variant, type(candidate)(variant.id))

    def run(self, ids, mask):
        return self._onnx.run(ids, mask)


class NotANumber(Good):
    def run(self, ids, mask):
        return np.full((len(ids), self.dim), np.nan, np.float32)


class Unchecked(Good):
    """Not finite, and it does not look."""

    def run(self, ids, mask):
        vectors = super().run(ids, mask)
        vectors[:, ::2] = np.nan
        return vectors


class Permuted(Good):
    def run(self, ids, mask):
        return np.roll(super().run(ids, mask), 1, axis=1)


class Crashing(Good):
    def run(self, ids, mask):
        os.abort()


class Hanging(Good):
    def run(self, ids, mask):
        time.sleep(600)
'''
FAULTS = {
    "not-a-number": "cosine of nan",
    "unchecked": "cosine of nan",
    "permuted": "cosine of",
    "crashing": "SIGABRT",
    "hanging": "no answer within 6 s",
}


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "stand_ins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-ins\nVersion: 1.0\n")
    classes = {"good": "Good", "not-a-number": "NotANumber", "unchecked": "Unchecked", "permuted": "Permuted"}
    classes |= {"crashing": "Crashing", "hanging": "Hanging"}
    lines = "".join(f"{name} = stand_ins:{value}\n" for name, value in classes.items())
    (info / "entry_points.txt").write_text(f"[ruvltra_edge.backends]\n{lines}")
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.setattr("edge.tune.LIMIT", 6.0)


@pytest.mark.usefixtures("stand_ins")
def test_tune_drops_what_is_wrong_and_names_the_reason(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    tuning = tune(bundle, seconds=0.01, limit=6)
    failures = {t.candidate.provider: t.failure for t in tuning.trials if t.failure is not None}
    assert failures.keys() == FAULTS.keys()
    for name, reason in FAULTS.items():
        assert reason in str(failures[name])
    good = {trial.candidate.provider for trial in tuning.trials if trial.failure is None}
    assert good == {"cpu", "good"}
    assert {winner.provider for winner in tuning.winners.values()} <= good
    table = tuning.table()
    assert all(f"on {name}," in table for name in (*FAULTS, "good", "cpu"))
    assert table.count("FAILED") == len(FAULTS)
    # What was kept is what was measured.
    again = kept(bundle)
    assert again is not None
    assert (again.trials, again.winners) == (tuning.trials, tuning.winners)
    placement = Encoder.load(bundle).placement
    assert placement is not None
    assert placement.candidate == tuning.winners["latency"]
    assert "measured on" in placement.reason
    # And doctor says why the others are not used.
    assert main(["doctor", str(bundle.path)]) == 0
    said = capsys.readouterr().out
    assert "not used: crashing: back end of stand-ins 1.0; fails: its process ended without a result (SIGABRT)" in said


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", FAULTS)
def test_auto_drops_it_with_a_warning(bundle: Bundle, name: str) -> None:
    """As if it had won a measurement that nobody can vouch for."""
    winner = Candidate("int8", name)
    _keep(bundle, Tuning("2026-01-01 00:00", (Trial(winner, "not proven"),), {"latency": winner}))
    with pytest.warns(EdgeWarning, match=FAULTS[name]) as warned:
        router = Router.load(bundle)
    assert len(warned) == 1
    assert "Until then: int8 on cpu" in str(warned[0].message)
    assert router.route("Fix the null pointer in the login handler").agent == "debugger"


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", FAULTS)
def test_asked_for_it_raises(bundle: Bundle, name: str) -> None:
    with pytest.raises(BackendError, match=FAULTS[name]):
        Encoder.load(bundle, device=name)


@pytest.mark.usefixtures("stand_ins")
def test_a_fault_that_begins_after_the_trial_is_caught_by_the_golden(bundle: Bundle) -> None:
    winner = Candidate("int8", "permuted")
    _keep(bundle, Tuning("2026-01-01 00:00", (Trial(winner),), {"latency": winner}))
    with pytest.warns(EdgeWarning, match="cosine of"):
        assert Encoder.load(bundle).encode(["a"]).shape == (1, 384)
    with pytest.raises(OutputError, match="cosine of"):
        Encoder.load(bundle, device=Provider("permuted", {}), threads=1)


@pytest.mark.usefixtures("stand_ins")
def test_a_back_end_of_another_package_is_used_when_asked_for(bundle: Bundle, router: Router) -> None:
    encoder = Encoder.load(bundle, device="good")
    assert router.encoder is not None
    text = "rename the flag everywhere"
    np.testing.assert_array_equal(encoder.encode([text]), router.encoder.encode([text]))
    with pytest.raises(PlacementError, match="does not say where"):
        Encoder.load(bundle, device="good", strict=True)


def test_the_cpu_alone_asks_for_nothing_and_warns_of_nothing(bundle: Bundle, recwarn: pytest.WarningsRecorder) -> None:
    encoder = Encoder.load(bundle, strict=True)
    assert encoder.placement is not None
    assert encoder.placement.share == 1.0
    assert sum(encoder.placement.nodes.values()) > 50
    assert encoder.placement.candidate.provider == "cpu"
    assert not recwarn.list
    assert not (cache_folder() / TUNING).exists()


def test_tune_by_the_command(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "front.png"
    assert main(["tune", str(bundle.path), "--seconds", "0.01", "--plot", str(plot), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["winners"].keys() == {"latency", "throughput", "memory"}
    assert all(trial["failure"] is None for trial in document["trials"])
    assert {(t["tokens"], t["batch"]) for t in document["trials"][0]["timings"]} == {
        (tokens, batch) for tokens in (4, 12, 48) for batch in (1, 16)
    }
    assert plot.read_bytes().startswith(b"\x89PNG")
    for use in ("latency", "throughput", "memory"):
        placement = Encoder.load(bundle, use=use).placement
        assert placement is not None
        assert f"best for {use} of " in placement.reason
    assert main(["device", "--json"]) == 0
    device = json.loads(capsys.readouterr().out)
    assert device["providers"][-1]["name"] == "cpu"
    assert main(["device"]) == 0
    assert "worth having" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "entries": []}', '{"format": 99}'])
def test_a_broken_cache_counts_as_none(bundle: Bundle, content: str) -> None:
    cache_folder().mkdir(exist_ok=True)
    (cache_folder() / TUNING).write_text(content)
    assert kept(bundle) is None
    assert Encoder.load(bundle).placement is not None
    prove(bundle, Candidate("int8"))
    assert kept(bundle) is not None


def test_where_nothing_can_be_kept_it_still_runs(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUVLTRA_CACHE", str(tmp_path / "file" / "cache"))
    prove(bundle, Candidate("int8"))
    assert Encoder.load(bundle).encode(["a"]).shape == (1, 384)
    assert main(["tune", "--seconds", "0.01", "--json"]) == 1
    assert "another folder in RUVLTRA_CACHE" in capsys.readouterr().err


def test_what_was_measured_elsewhere_does_not_count(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    prove(bundle, Candidate("int8"))
    assert kept(bundle) is not None
    nano = Bundle.open(MINI.parent / "ruvltra-nano" / "bundle")
    assert kept(nano) is None
    prove(nano, Candidate("int8"))
    assert kept(bundle) is not None  # both are kept
    monkeypatch.setattr(ort, "__version__", "9.9.9")
    assert kept(bundle) is None


def test_names_that_are_not_there() -> None:
    here = (
        Installed("openvino", "plug-in onnxruntime-ep-openvino 1.8.1", ("CPU X",), None, "onnxruntime-ep-openvino"),
        Installed("webgpu", "plug-in onnxruntime-ep-webgpu 0.4.0", (), "finds no hardware here that it can use", "p"),
        Installed("AzureExecutionProvider", "built in", unusable="calls a service"),
        Installed("cuda", "built in"),
        Installed("cpu", "built in"),
    )
    assert find("openvino", here) is find("OpenVINOExecutionProvider", here) is here[0]
    with pytest.raises(
        ProviderUnavailable, match=r"webgpu \(plug-in .*\) finds no hardware .* auto, openvino, cuda, cpu"
    ):
        find("webgpu", here)
    with pytest.raises(ProviderUnavailable, match="calls a service"):
        find("AzureExecutionProvider", here)
    with pytest.raises(ProviderUnavailable, match="not part of the installed"):
        find("tensorrt", here)
    with pytest.raises(ProviderUnavailable, match="nor known"):
        find("abacus", here)
    assert options_of(here[3], "cache") == {"arena_extend_strategy": "kSameAsRequested"}
    assert options_of(here[0], "cache") == {}  # as a plug-in, OpenVINO has other options
    assert options_of(Installed("tensorrt", "built in"), "folder")["trt_engine_cache_path"] == "folder"
    assert options_of(Installed("mine", "back end of x"), "folder") == {}


def test_candidates_of_made_up_providers(bundle: Bundle) -> None:
    here = (
        Installed("openvino", "plug-in x", ("CPU Intel", "GPU Arc", "NPU Intel"), None, "x"),
        Installed("webgpu", "plug-in y", (), "finds nothing", "y"),
        Installed("cuda", "built in"),
        Installed("cpu", "built in"),
    )
    found = [(c.provider, c.hardware) for c in candidates(bundle, here) if c.provider != "cpu"]
    assert found == [("openvino", "CPU"), ("openvino", "GPU"), ("openvino", "NPU"), ("cuda", "")]
    alone = candidates(bundle, here[-1:])
    assert {c.provider for c in alone} == {"cpu"}
    assert {c.threads for c in alone} >= {1}


def test_the_table_prefers_int8_and_falls_back(bundle: Bundle) -> None:
    mini = Bundle.open(MINI / "apple")
    order = [choice.candidate for choice in policy(mini, Wish())]
    assert [(c.variant, c.provider, c.threads) for c in order] == [("int8", "cpu", 1)]
    (choice,) = policy(bundle, Wish(variant="int8", threads=3))
    assert (choice.candidate.threads, choice.reason) == (3, "the variant that was asked for")
    assert "int8" in next(policy(bundle, Wish())).reason


def test_placement_is_held_to_the_provider() -> None:
    from edge.choice import check_placement

    candidate = Candidate("fp32", "openvino")
    check_placement(Placement(candidate, "", {"OpenVINOExecutionProvider": 147}))
    with pytest.raises(PlacementError, match="141 on OpenVINOExecutionProvider, 6 on CPUExecutionProvider"):
        check_placement(Placement(candidate, "", {"OpenVINOExecutionProvider": 141, "CPUExecutionProvider": 6}))
    with pytest.raises(PlacementError, match="does not say"):
        check_placement(Placement(candidate, "", {}))
    partial = Trial(candidate, nodes={"OpenVINOExecutionProvider": 1, "CPUExecutionProvider": 3})
    timed = Trial(candidate, None, 1.0, 0.1, 2**27, partial.nodes, (Timing(12, 1, 1.0, 2.0),))
    assert "(3 of 4 operations run elsewhere)" in Tuning("", (timed,), {}).table()
    assert Trial.of(json.loads(json.dumps(timed.document()))) == timed


def test_a_provider_of_fixed_shapes_gets_a_session_a_length(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, as if it were such a provider."""
    variant = bundle.variant()
    plain = OnnxBackend(bundle, variant, Candidate("int8"))
    monkeypatch.setitem(KNOWN, "fixed", Known(KNOWN["cpu"].provider, static=True))
    fixed = OnnxBackend(bundle, variant, Candidate("int8", "fixed"))
    for length in (1, 16, 17, 200, 256):
        ids = np.array([[101, *[2000 + i for i in range(length - 2)], 102][:length]], dtype=np.int64)
        near = float((fixed.run(ids, np.ones_like(ids)) @ plain.run(ids, np.ones_like(ids)).T)[0, 0])
        assert near > 0.96  # int8 scales by the whole tensor, padding included
    both = np.array([[101, 2000, 102], [101, 2001, 102]], dtype=np.int64)
    assert fixed.run(both, np.ones_like(both)).shape == (2, 384)


def test_what_cannot_be_meant(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="unknown use"):
        Encoder.load(bundle, use="magic")
    with pytest.raises(InputError, match="takes no options"):
        Encoder.load(bundle, device=Provider("cpu", {"a": "b"}))
    with pytest.raises(BackendError, match="1 to 256"):
        Encoder.load(bundle, threads=0)
    for arguments in (["--option", "novalue"], ["--use", "magic"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            main(["route", *arguments, "x"])
    assert main(["route", "--device", "abacus", "x"]) == 1
    assert "nor known" in capsys.readouterr().err
    for value in ("0", "-1", "nan", "x"):
        with pytest.raises(SystemExit):
            main(["tune", "--seconds", value])
    gone = run_trial(tmp_path / "none", Candidate("int8"))
    assert "no bundle here" in str(gone.failure)


def test_texts_side_by_side_are_those_one_by_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Fix number {number} in the {'long ' * (number % 7)}list" for number in range(60)]
    one_by_one = Encoder(bundle, OnnxBackend(bundle, bundle.variant(), Candidate("int8")))
    expected = np.stack([one_by_one.encode([text])[0] for text in texts])
    monkeypatch.setattr("edge.choice.usable_cores", lambda: 4)
    several = Encoder.load(bundle)
    seen: set[int] = set()
    started = threading.Barrier(4, timeout=30)

    def wait(text: str) -> str:
        if len(seen) < 4 and threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            started.wait()
        return text

    assert several.each(wait, texts[:4]) == texts[:4]  # four at the same time, or the barrier breaks
    np.testing.assert_array_equal(several.encode(texts), expected)
