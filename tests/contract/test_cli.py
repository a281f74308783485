"""The command line as others script against it: real processes, real input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edge
from edge import Router
from edge.cli import main
from tests.conftest import MINI, ROOT

KEYS = ["task", "agent", "method", "confidence", "margin", "matched", "ranking", "truncated", "ms"]


def ruvltra(*arguments: str, stdin: bytes = b"", cwd: Path = ROOT) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "edge.cli", *arguments], input=stdin, capture_output=True, cwd=cwd, timeout=300
    )


def test_route_one_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "Fix the null pointer in the login handler"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("debugger ")
    assert 'keywords "fix", "null pointer"' in line
    assert "embedding" in line
    assert line.rstrip().endswith("ms")


def test_route_json_has_these_keys_in_this_order(capsys: pytest.CaptureFixture[str], router: Router) -> None:
    assert main(["route", "--json", "Write unit tests for the parser"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert list(row) == KEYS
    assert row["agent"] == "tester"
    assert row["method"] == "hybrid"
    assert row["ms"] > 0
    assert [set(entry) for entry in row["ranking"]] == [{"id", "score", "cosine"}] * 13
    assert row["confidence"] == router.route("Write unit tests for the parser").confidence


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", ""]) == 3
    assert capsys.readouterr().out.startswith("- ")
    assert main(["route", "", "Write unit tests"]) == 0
    assert main(["route", "--json", ""]) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["agent"] is None
    assert main(["route", "--bundle", "/nowhere", "x"]) == 1
    assert "no bundle here" in capsys.readouterr().err
    for usage in (
        ["route"],
        ["route", "--strategy", "magic", "x"],
        ["route", "--threads", "0", "x"],
        ["route", "--threads", "9" * 20, "x"],
        [],
        ["fly"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(usage)
        assert stop.value.code == 2


@pytest.mark.parametrize("strategy", edge.STRATEGIES[:4])
def test_every_strategy(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "--json", "--strategy", strategy, "investigate the options", "fix the crash"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["agent"] for row in rows] == ["researcher", "debugger"]


def test_a_thousand_lines_of_anything() -> None:
    nasty = [
        b"",
        b"fix the crash " * 7_500,  # 105 kB
        b"fix \0 the \0 crash",
        b"broken \xed\xa0\x80 surrogate and \xff\xfe bytes",
        "أصلح خطأ تسجيل الدخول".encode(),
        "🚀🔥👩‍👩‍👧‍👦 ship it".encode(),
        b"\x1b[31mred\x1b[0m \x07 \x08",
        "line\u2028separator and \u0085 next line".encode(),
        b'{"task": "quotes \\" and braces"}',
        b"windows line\r",
    ]
    lines = [nasty[i % 20] if i % 20 < len(nasty) else f"write test number {i}".encode() for i in range(1000)]
    result = ruvltra("route", "--json", "-", stdin=b"\n".join(lines) + b"\n")
    assert result.returncode == 0, result.stderr[-500:]
    assert result.stderr == b""
    out = result.stdout.decode("ascii").splitlines()
    assert len(out) == 1000
    for line, text in zip(out, lines, strict=True):
        row = json.loads(line)
        assert row["task"] == text.decode("utf-8", "replace").rstrip("\r")
        assert row["truncated"] == (len(text) > 100_000)
        assert len(row["ranking"]) == 13
        if not text:
            assert row["agent"] is None
        if text.startswith(b"write test"):
            assert row["agent"] == "tester"


def test_lone_surrogates_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "--json", "fix the crash \udcff \ud83d\ude80"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "fix the crash \ufffd \U0001f680"


def test_streaming_answers_before_the_input_ends() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "edge.cli", "route", "--json", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdin
        assert process.stdout
        for task in (b"fix the crash\n", b"write unit tests\n"):
            process.stdin.write(task)
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["task"] == task.decode().strip()
        process.stdin.close()
        assert process.wait(60) == 0


def test_closed_and_full_streams_are_clear_errors() -> None:
    command = f"{sys.executable} -m edge.cli route --json"
    closed = subprocess.run(f"{command} - <&-", shell=True, capture_output=True, cwd=ROOT, timeout=60)
    assert closed.returncode == 1
    assert closed.stderr.startswith(b"ruvltra: standard input is closed.")
    full = subprocess.run(
        f"{command} 'fix the crash' > /dev/full", shell=True, capture_output=True, cwd=ROOT, timeout=60
    )
    assert full.returncode == 1
    assert full.stderr.startswith(b"ruvltra: [Errno 28]")


def test_a_reader_that_goes_away_is_no_crash() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "edge.cli", "route", "--json", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"fix the crash\n" * 50)
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        try:
            process.stdin.write(b"fix the crash\n" * 200)
            process.stdin.close()
        except BrokenPipeError:
            pass
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_embed(tmp_path: Path, router: Router, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["Fix the crash", "", "écrire des tests"]
    assert router.encoder is not None
    expected = router.encoder.encode(texts)
    result = ruvltra("embed", "--json", "-", stdin="\n".join(texts).encode())
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["text"] for row in rows] == texts
    np.testing.assert_array_equal(np.array([row["vector"] for row in rows], dtype=np.float32), expected)
    assert main(["embed", "--output", str(tmp_path / "vectors.npy"), *texts]) == 0
    written = np.load(tmp_path / "vectors.npy", allow_pickle=False)
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.npy"]
    for wrong in (tmp_path / "no" / "vectors.npy", tmp_path):
        assert main(["embed", "--output", str(wrong), "x"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("Fix the crash", "debugger"), ("Write unit tests", "tester"), ("boil an egg", "none")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"task": t, "agent": a, "near": None}) + "\n" for t, a in rows))
    assert main(["eval", str(path), "--json", "--plot", str(tmp_path / "plot.png")]) == 0
    scores = {score["strategy"]: score for score in json.loads(capsys.readouterr().out)["scores"]}
    assert list(scores) == [strategy for strategy in edge.STRATEGIES if strategy != "generate"]
    assert scores["hybrid"]["accuracy"]["value"] == 1.0
    assert scores["hybrid"]["accuracy"]["n"] == 2
    assert scores["hybrid"]["abstain_recall"]["n"] == 1
    assert (tmp_path / "plot.png").stat().st_size > 5_000
    assert main(["eval", str(path), "--strategy", "keyword"]) == 0
    text = capsys.readouterr().out
    assert "keyword" in text
    assert "hybrid" not in text
    path.write_text('{"task": "x"}\n')
    assert main(["eval", str(path)]) == 1
    assert f"{path}:1" in capsys.readouterr().err


def test_eval_and_route_with_your_own_agents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "agents"
    folder.mkdir()
    (folder / "a.md").write_text("---\nname: dba\ndescription: Postgres schema, indexes and slow queries.\n---\n")
    (folder / "b.md").write_text("---\nname: mobile\ndescription: iOS and Android apps.\n---\n")
    assert main(["route", "--json", "--agents", str(folder), "vacuum the postgres table"]) == 0
    assert json.loads(capsys.readouterr().out)["agent"] == "dba"
    (folder / "b.md").write_text("---\nname: dba\ndescription: x\n---\n")
    assert main(["route", "--agents", str(folder), "x"]) == 1
    assert "b.md:1: agent 'dba' was already defined" in capsys.readouterr().err


def test_inspect_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect"]) == 0
    assert "ruvltra-mini" in capsys.readouterr().out
    assert main(["inspect", "--json", str(MINI / "bundle")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["encoder"]["dim"] == 384
    assert len(summary["agents"]) == 13
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert all(check["ok"] for check in report["checks"])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.count("ok  ") == len(report["checks"])


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ruvltra-edge {edge.__version__}\n"
    for verb in ("route", "embed", "eval", "inspect", "doctor"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
