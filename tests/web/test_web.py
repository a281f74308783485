from __future__ import annotations

import http.client
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from edge import Bundle, Router
from edge.bundle import manifest_digest
from edge.router import STRATEGIES, Decision
from tests.conftest import MINI, ROOT
from tests.web.conftest import WEB, browse, node, playground

# How near a cosine and a confidence are to Python's. WebAssembly and this CPU round int8 sums alike, but not the float
# operations between them; an activation that falls on the other side of a step moves a cosine by up to 0.02, and that
# a probability p by p (1 - p) times a weight of some 20. Node has Python's kernels and fusions, and differs by 1e-7.
BROWSER = (0.03, 0.1)
NODE = (1e-4, 1e-4)
ODD = [
    "",
    "   ",
    "\x00\x01\x02",
    "\x1c\x1d leading separators",
    "Straße ΣΊΣΥΦΟΣ ŉ İstanbul",
    "c++ c# .net ci decision ci/cd",
    "ﬁx the nuLL  Pointer",
    "日本語のバグを直す",
    "emoji 🚀🏽 fix 👩‍💻 the build",
    "fix the bug " * 200,
    "ab" * 6000,
    "😀" * 9000,
    "fix\ud800the bug",
    "rtl ‮ override and zero​width",
]


def tasks(count: int) -> list[str]:
    rows = (MINI / "splits" / "test.jsonl").read_text("utf-8").splitlines()
    return random.Random(10).sample([json.loads(row)["task"] for row in rows], count)


def same(made: dict[str, Any], decision: Decision, task: str, near: tuple[float, float], tie: float = 0.0) -> None:
    """Both decide alike; but for the agent where Python's first two are nearer to each other than ``tie``."""
    if decision.margin >= tie:
        assert (made["agent"], made["method"]) == (decision.agent, decision.method), task
        assert made["matched"] == list(decision.matched), task
    assert made["truncated"] == decision.truncated, task
    assert made["confidence"] == pytest.approx(decision.confidence, abs=near[1]), task
    cosines = {row["id"]: row["cosine"] for row in made["ranking"]}
    assert cosines == pytest.approx({ranked.id: ranked.cosine for ranked in decision.ranking}, abs=near[0]), task
    assert sum(row["score"] for row in made["ranking"]) <= 1 + 1e-9


def refused(request: dict[str, Any]) -> str:
    """What Node says of a request that it refuses."""
    script = Path(__file__).with_name("decide.mjs")
    done = subprocess.run(["node", script], input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


def test_the_browser_decides_as_python(address: str, router: Router) -> None:
    texts = tasks(200) + ODD
    rows = browse(address, "decisions", tasks=texts)
    for task, made in zip(texts, rows, strict=True):
        signals = router.signals(task)
        for strategy in set(STRATEGIES) - {"generate"}:
            same(made[strategy], router.decide(signals, strategy), task, BROWSER)


def test_node_decides_as_python(router: Router) -> None:
    texts = tasks(200) + ODD
    rows = node("decide.mjs", {"folder": str(MINI / "bundle"), "tasks": texts})
    for task, made in zip(texts, rows, strict=True):
        signals = router.signals(task)
        assert router.encoder is not None
        assert made["ids"] == list(router.encoder.tokenize(task.lstrip()[:8192]).ids), task
        for strategy in set(STRATEGIES) - {"generate"}:
            same(made["decisions"][strategy], router.decide(signals, strategy), task, NODE)


def test_tokens_of_odd_texts_are_pythons(router: Router) -> None:
    """Random texts of the scripts that both Unicode tables know, ideographs of the second plane, special tokens."""
    random_ = random.Random(7)
    spans = [(32, 127), (0xA0, 0x380), (0x400, 0x500), (0x4E00, 0x9000), (0xAC00, 0xD7A4), (0x1F300, 0x1F650)]
    spans += [(0x20000, 0x2A6DE), (0x2F800, 0x2FA1E), (0, 32)]
    texts = [
        "".join(chr(random_.randrange(*random_.choice(spans))) + random_.choice(["", "", " "]) for _ in range(length))
        for length in (random_.randrange(1, 60) for _ in range(300))
    ]
    texts += ["fix [SEP] the [CLS] bug", "[C[CLS]S]", "\U00020000\U00020001 fix", "a" * 101, "e\u0301\u0302" * 200]
    rows = node("decide.mjs", {"folder": str(MINI / "bundle"), "tasks": texts})
    assert router.encoder is not None
    for text, made in zip(texts, rows, strict=True):
        assert made["ids"] == list(router.encoder.tokenize(text).ids), text


def test_keywords_alone_need_no_model(tmp_path: Path, bundle: Bundle) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(MINI / "bundle", folder, ignore=shutil.ignore_patterns("model.*"))
    texts = [*tasks(50), *ODD]
    python = Router.load(bundle, strategy="keyword")
    rows = node("decide.mjs", {"folder": str(folder), "tasks": texts, "strategy": "keyword"})
    for task, made in zip(texts, rows, strict=True):
        same(made["decisions"]["keyword"], python.route(task), task, NODE)


def test_a_path_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(MINI / "bundle", folder)
    (folder / "agents.json").rename(tmp_path / "agents.json")
    manifest = (folder / "bundle.json").read_bytes().replace(b'"agents.json"', b'"../agents.json"')
    (folder / "bundle.json").write_bytes(manifest)
    (folder / "bundle.json.sha256").write_bytes(manifest_digest(manifest))
    assert "is not a path inside the bundle" in refused({"folder": str(folder), "tasks": []})


def test_own_agents_in_both(address: str, own: tuple[list[dict[str, Any]], Router]) -> None:
    agents, python = own
    texts = [*tasks(40), "the app on the STRASSE", "the app store refuses the app", "c++ layout", "postgres is slow"]
    browsers = browse(address, "decisions", tasks=texts, agents=agents)
    nodes = node("decide.mjs", {"folder": str(MINI / "bundle"), "tasks": texts, "agents": agents})
    for task, in_browser, in_node in zip(texts, browsers, nodes, strict=True):
        signals = python.signals(task)
        for strategy in set(STRATEGIES) - {"generate"}:
            decision = python.decide(signals, strategy)
            same(in_browser[strategy], decision, task, BROWSER, tie=0.05)
            same(in_node["decisions"][strategy], decision, task, NODE)


def test_keywords_are_found_as_in_python(router: Router) -> None:
    """On tasks, and on words of the rules among characters of all scripts that Python and Node both know."""
    random_ = random.Random(3)
    words = [word for agent in router.agents for word in agent.keywords]
    others = [chr(code) for code in range(32, 0x2000) if chr(code).isprintable()] + list("ßẞſΣςσİıŉﬁ①Ⅷ½ªµ") * 30
    mixed = [
        "".join(
            random_.choice([*others[:95], " ", random_.choice(words).title(), random_.choice(others)])
            for _ in range(12)
        )
        for _ in range(1500)
    ]
    texts = [*tasks(500), *mixed]
    rows = node("match.mjs", {"folder": str(MINI / "bundle"), "tasks": texts})
    assert sum(any(row) for row in rows) > 200
    for task, made in zip(texts, rows, strict=True):
        assert made == [list(found) for found in router._rules.match(task).phrases], task


def test_vectors_are_the_goldens(address: str, bundle: Bundle) -> None:
    seen = browse(address, "goldens")
    assert seen["others"] == 0
    assert seen["lowest"] >= bundle.variant().minimum_cosine


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 360)])
def test_a_visit(address: str, scheme: str, width: int) -> None:
    task = "Fix the null pointer in the login handler"
    seen = browse(address, "visit", task=task, scheme=scheme, viewport={"width": width, "height": 800})
    assert seen["agent"] == "debugger"
    assert "ms" in seen["why"]
    assert seen["marked"] == ["Fix", "null pointer"]
    assert seen["bars"] == seen["labels"] == 13
    assert seen["wide"] == 0, "it scrolls sideways"
    assert sum(map(int, re.findall(r"\d+", seen["paper"])[:3])) > 600 if scheme == "light" else True
    assert sum(map(int, re.findall(r"\d+", seen["paper"])[:3])) < 150 if scheme == "dark" else True
    assert seen["own"] == "gardener"


def test_keywords_with_signs_are_marked(address: str) -> None:
    marks = {
        "write end-to-end tests for the checkout": ["end-to-end tests"],
        "speed up the n+1 queries": ["speed up", "n+1"],
        "the ci/cd pipeline for staging": ["ci/cd", "pipeline", "staging"],
    }
    rows = browse(address, "marks", tasks=list(marks))
    assert [row["marked"] for row in rows] == list(marks.values())
    assert all(row["agent"] == row["first"] and not row["error"] for row in rows)


def test_nothing_is_decided_while_an_agent_is_broken(address: str) -> None:
    at, typed, named = browse(address, "nameless")
    assert at == typed
    assert "has no name" in at[0]
    assert at[1] == "…"
    assert named == ["", "gardener"]


def test_what_is_kept_by_somebody_else_is_passed_over(address: str) -> None:
    seen = browse(address, "kept", kept=["[null]", '[{"name": "x", "keywords": "y"}]', "{}", "no JSON"])
    assert seen == ["debugger"] * 4


def test_webgpu_must_prove_itself(address: str) -> None:
    """On an adapter of software, which Chromium brings: it runs, is measured, and loses."""
    said = browse(address, "webgpu", flags=["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"])
    assert re.search(r"WebGPU: [\d.]+ ms, WebAssembly [\d.]+ ms; \w+ is used", said)


def test_files_work_below_any_path(tmp_path: Path) -> None:
    """Written from a zipped bundle, and served by a server that knows nothing of them."""
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in (ROOT / "models" / "ruvltra-nano" / "bundle").iterdir():
            zipped.write(file, file.name)
    folder = tmp_path / "site" / "some" / "where"
    folder.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "edge.cli", "playground", "--bundle", archive, "--output", folder]
    for _ in range(2):  # the second time over the first
        assert subprocess.run(command, check=False).returncode == 0
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "site")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site = f"http://127.0.0.1:{server.server_port}/some/where/"
        try:
            assert browse(site, "goldens")["others"] == 0
            weights = next((folder / "bundle").glob("*.bin"))
            content = bytearray(weights.read_bytes())
            content[1000] ^= 1
            weights.write_bytes(content)
            assert "is not the file that the manifest lists" in browse(site, "refusal")
        finally:
            server.shutdown()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    done = subprocess.run([*command[:-1], tmp_path / "other"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "holds something else" in done.stderr
    assert (tmp_path / "other" / "file").exists()


def ask(address: str, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.request("GET", path, headers=headers)
    try:
        response = connection.getresponse()
        response.read()
    finally:
        connection.close()
    return response


def test_it_serves_its_files_and_nothing_else(address: str) -> None:
    page = ask(address, "/")
    assert page.status == 200
    assert "default-src 'none'" in (page.getheader("Content-Security-Policy") or "")
    assert ask(address, "/", **{"If-None-Match": page.getheader("ETag") or ""}).status == 304
    for path in (
        "/../pyproject.toml",
        "/%2e%2e/cli.py",
        "//etc/passwd",
        "/package.json",
        "/vendor/",
        "/bundle/../cli.py",
    ):
        assert ask(address, path).status == 404, path
    assert ask(address, "/", Host="evil.example").status == 403
    assert ask(address, "/vendor/ort-wasm-simd-threaded.wasm").getheader("Content-Type") == "application/wasm"


def test_the_policy_of_the_page_is_the_servers() -> None:
    from edge.playground import POLICY

    stated = re.search(r'content="(default-src [^"]*)"', (WEB / "index.html").read_text("utf-8"))
    assert stated is not None
    assert POLICY.startswith(stated[1])  # a page cannot say who may frame it


def test_the_table_of_case_folding_is_current() -> None:
    sys.path.insert(0, str(WEB))
    try:
        from generate_casefold import source
    finally:
        sys.path.pop(0)
    assert source() == (WEB / "casefold.js").read_text("utf-8")


def test_licences_go_with_the_packages() -> None:
    text = (WEB / "vendor" / "NOTICE.txt").read_text("utf-8")
    assert "Copyright (c) Microsoft Corporation" in text
    assert "Permission is hereby granted" in text
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_without_its_packages_it_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge import InputError
    from edge import playground as module

    monkeypatch.setattr(module, "WEB", tmp_path)
    with pytest.raises(InputError, match="npm ci --ignore-scripts && npm run build"):
        module.site(Bundle.open(MINI / "bundle"))


def test_broken_agents_are_refused_in_words(own: tuple[list[dict[str, Any]], Router]) -> None:
    agents, _ = own
    for broken, said in (
        ([], "at least one agent"),
        ([{**agents[0], "name": " "}], "has no name"),
        ([agents[0], agents[0]], "occurs twice"),
        ([{"name": "x"}], "neither description nor examples"),
        ([{**agents[0], "colour": "red"}], "unknown field colour"),
        ([{**agents[0], "keywords": "postgres"}], "keywords must be a list"),
        ([{**agents[0], "keywords": ["\x1c"]}], "keywords must be a list"),
        ([{**agents[0], "description": 5}], "description must be a text"),
        ([{**agents[0], "name": "a\x07b"}], "cannot be printed"),
    ):
        assert said in refused({"folder": str(MINI / "bundle"), "tasks": [], "agents": broken})


EXAMPLES = re.findall(r"^```js\n(.*?)^```", (ROOT / "docs" / "node.md").read_text("utf-8"), re.S | re.M)


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_examples_of_the_page_on_node_run(code: str, tmp_path: Path) -> None:
    assert "./edge/web/node.js" in code
    shutil.copytree(MINI / "bundle", tmp_path / "models" / "ruvltra-mini" / "bundle")
    script = tmp_path / "example.mjs"
    script.write_text(code.replace("./edge/web/node.js", (WEB / "node.js").as_uri()), "utf-8")
    done = subprocess.run(["node", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"console\.log\(.*\); // (.*)", code)
    assert said
    assert done.stdout.splitlines() == said


def test_nano_in_the_browser_too() -> None:
    for site in playground("--bundle", str(ROOT / "models" / "ruvltra-nano" / "bundle")):
        texts = tasks(60)
        router = Router.load(ROOT / "models" / "ruvltra-nano" / "bundle")
        for task, made in zip(texts, browse(site, "decisions", tasks=texts), strict=True):
            same(made["hybrid"], router.route(task), task, BROWSER)
