"""``ruvltra-export fetch`` against a hub in a thread: the endpoints, headers and errors that huggingface_hub uses."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from edge import MissingExtra
from export.cli import main
from export.errors import CheckpointError
from export.fetch import fetch

COMMIT = "5f3c6a0e9d1b4c7f8a2e3d4c5b6a79880f1e2d3c"
CHUNK = 10 << 20  # huggingface_hub writes what has arrived in pieces of this size
# Long enough to be cut behind the first piece.
WEIGHTS = random.Random(0).randbytes(CHUNK + (2 << 20))
SMALL = b"GGUF" + random.Random(1).randbytes(3000)
TOKEN = "hf_accepted"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """A hub of one repository, ann/model; large files are answered by a redirect, as the hub does.

    Attributes:
        files: The repository's files, by path.
        small: Those that are no large (LFS) file.
        sent: What is sent in a file's stead.
        cuts: Bytes after which the next downloads break off; None sends all.
        access: "open", "gated", "private" or "forbidden".
        requests: Method, path and Range of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"model.gguf": SMALL, "quantised/big file.gguf": WEIGHTS, "README.md": b"# A model\n"}
        self.small = {"README.md"}
        self.sent: dict[str, bytes] = {}
        self.cuts: list[int | None] = []
        self.access = "open"
        self.stated_size: int | None = None
        self.states_digests = True
        self.honours_ranges = True
        self.broken_off = threading.Event()
        self.stalls = False
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str | None]:
        """The Range of each download of content."""
        return [asked for method, path, asked in self.requests if method == "GET" and not path.startswith("/api/")]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers["Range"]))
        if path == "/api/models/odd/page":
            self.answer(200, body=b"<html>Please log in to this network</html>")
        elif path == "/api/models/odd/model":
            self.answer(200, body=b'{"id": "odd/model"}')
        elif path == "/api/models/busy/model":
            self.answer(503, body=b'{"error": "over capacity"}')
        elif not re.match(r"(/api/models)?/ann/model(/|$)|/cdn/", path) or hub.access == "private":
            self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif hub.access == "forbidden":
            self.answer(403, {"X-Error-Message": "the token may not read this"})
        elif path.startswith("/api/"):
            self.repository(path)
        elif path.startswith("/cdn/"):
            self.content(path.removeprefix("/cdn/"), {})
        else:
            self.resolve(path)

    def repository(self, path: str) -> None:
        hub, revision = self.server, path.partition("/revision/")[2] or "main"
        if revision not in ("main", "refs/pr/1", COMMIT):
            self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
            return
        assert "blobs=True" in self.path
        siblings: list[dict[str, object]] = []
        for name, content in hub.files.items():
            size = hub.stated_size or len(content)
            siblings.append({"rfilename": name, "size": size})
            if hub.states_digests:
                siblings[-1]["blobId"] = blob_id(content)  # a large file's is its pointer's, which nothing compares
                if name not in hub.small:
                    siblings[-1]["lfs"] = {"sha256": sha256(content), "size": size, "pointerSize": 134}
        self.answer(200, body=json.dumps({"id": "ann/model", "sha": COMMIT, "siblings": siblings}).encode())

    def resolve(self, path: str) -> None:
        hub = self.server
        found = re.fullmatch(rf"/ann/model/resolve/{COMMIT}/(.+)", path)
        assert found, path
        name = found[1]
        if hub.access == "gated" and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(
                403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model ann/model is restricted"}
            )
        elif name in hub.small:
            self.content(name, {"ETag": f'"{blob_id(hub.files[name])}"', "X-Repo-Commit": COMMIT})
        else:
            linked = {"X-Linked-Etag": f'"{sha256(hub.files[name])}"', "X-Linked-Size": str(len(hub.files[name]))}
            location = f"{hub.address}/cdn/{name.replace(' ', '%20')}"
            self.answer(302, {"Location": location, "X-Repo-Commit": COMMIT, **linked})

    def content(self, name: str, headers: dict[str, str]) -> None:
        hub = self.server
        content = hub.sent.get(name, hub.files[name])
        status, start = 200, 0
        if (asked := self.headers["Range"]) and hub.honours_ranges:
            status, start = 206, int(asked.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = hub.cuts.pop(0) if hub.cuts and self.command == "GET" else None
        self.answer(status, headers, content[start:], cut)

    def answer(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None and self.server.stalls:
            self.wfile.flush()
            self.server.broken_off.wait(30)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub of these tests is on this machine, and no other is asked."""
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: tuple[str, int]) -> None:
        assert address[0] == "127.0.0.1", f"a test tried to reach {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that HF_ENDPOINT names."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.address + "/")
        yield server
        server.broken_off.set()
        server.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_downloaded_and_named_with_commit_and_digest(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "models" / "new"
    found = fetch("ann/model:quantised/big file.gguf", out)
    assert found.file == out / "big file.gguf"
    assert found.file.read_bytes() == WEIGHTS
    assert (found.bytes, found.sha256) == (len(WEIGHTS), sha256(WEIGHTS))
    assert (found.repository, found.revision, found.downloaded) == ("ann/model", COMMIT, True)
    assert names(out) == ["big file.gguf"]
    assert hub.downloads() == [None]
    assert ("HEAD", f"/ann/model/resolve/{COMMIT}/quantised/big file.gguf", None) in hub.requests


def test_a_revision_and_another_hub_can_be_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    found = fetch("ann/model:model.gguf", tmp_path, revision="refs/pr/1", endpoint=hub.address)
    assert found.revision == COMMIT
    assert hub.requests[0][1] == "/api/models/ann/model/revision/refs/pr/1"


def test_a_small_file_is_held_against_the_id_of_its_git_blob(hub: Hub, tmp_path: Path) -> None:
    found = fetch("ann/model:README.md", tmp_path)
    assert found.sha256 == sha256(b"# A model\n")
    assert not fetch("ann/model:README.md", tmp_path).downloaded
    hub.sent["README.md"] = b"# a model\n"
    (tmp_path / "README.md").unlink()
    with pytest.raises(CheckpointError, match="git blob id is to be") as caught:
        fetch("ann/model:README.md", tmp_path)
    assert blob_id(b"# A model\n") in str(caught.value)
    assert blob_id(b"# a model\n") in str(caught.value)
    assert names(tmp_path) == []


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = [CHUNK + 4096]
    found = fetch("ann/model:quantised/big file.gguf", tmp_path)
    assert hub.downloads() == [None, f"bytes={CHUNK}-"]
    assert found.file.read_bytes() == WEIGHTS
    assert names(tmp_path) == ["big file.gguf"]


def test_a_later_run_goes_on_where_the_first_one_gave_up(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = [CHUNK + 4096, 0]
    with pytest.raises(CheckpointError, match=rf"broke off after {CHUNK} of {len(WEIGHTS)} bytes .*\. Run this again"):
        fetch("ann/model:quantised/big file.gguf", tmp_path)
    assert names(tmp_path) == [".big file.gguf.partial"]
    hub.requests.clear()
    assert fetch("ann/model:quantised/big file.gguf", tmp_path).file.read_bytes() == WEIGHTS
    assert hub.downloads() == [f"bytes={CHUNK}-"]
    assert names(tmp_path) == ["big file.gguf"]


def test_a_server_that_knows_no_ranges_begins_anew(hub: Hub, tmp_path: Path) -> None:
    hub.cuts, hub.honours_ranges = [CHUNK + 4096], False
    assert fetch("ann/model:quantised/big file.gguf", tmp_path).file.read_bytes() == WEIGHTS
    assert hub.downloads()[:2] == [None, f"bytes={CHUNK}-"]  # huggingface_hub 0.34 needs a third one


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Commands can be interrupted, even where the tests run in the background of a shell, which ignores it for them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupted_command_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.cuts, hub.stalls = [CHUNK + 4096], True
    command = [sys.executable, "-m", "export.cli", "fetch", "ann/model:quantised/big file.gguf", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            if any(path.stat().st_size == CHUNK for path in tmp_path.rglob("*.incomplete")):
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.02)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert errors.endswith("ruvltra-export: interrupted; the same command goes on where it stopped\n")
    assert names(tmp_path) == [".big file.gguf.partial"]
    hub.requests.clear()
    assert fetch("ann/model:quantised/big file.gguf", tmp_path).sha256 == sha256(WEIGHTS)
    assert hub.downloads() == [f"bytes={CHUNK}-"]


def test_other_content_than_the_hub_states_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.sent["model.gguf"] = SMALL[::-1]
    with pytest.raises(CheckpointError, match="Nothing was kept: fetch it again") as caught:
        fetch("ann/model:model.gguf", tmp_path)
    assert sha256(SMALL) in str(caught.value)
    assert sha256(SMALL[::-1]) in str(caught.value)
    assert names(tmp_path) == []
    del hub.sent["model.gguf"]
    assert fetch("ann/model:model.gguf", tmp_path).file.read_bytes() == SMALL


def test_more_content_than_the_hub_states_is_not_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    hub.sent["model.gguf"] = SMALL * 2
    with pytest.raises(CheckpointError, match="Run this again"):
        fetch("ann/model:model.gguf", tmp_path)
    assert hub.downloads() == [None]
    del hub.sent["model.gguf"]
    assert fetch("ann/model:model.gguf", tmp_path).file.read_bytes() == SMALL
    assert hub.downloads() == [None, None]


def test_a_digest_that_is_asked_for_counts_too(hub: Hub, tmp_path: Path) -> None:
    other = sha256(b"other")
    with pytest.raises(CheckpointError, match=f"--sha256 is {other}, but revision {COMMIT} has {sha256(SMALL)}"):
        fetch("ann/model:model.gguf", tmp_path, sha256=other)
    assert hub.downloads() == []  # the hub's word is enough
    assert fetch("ann/model:model.gguf", tmp_path, sha256=sha256(SMALL).upper()).downloaded
    with pytest.raises(CheckpointError, match=f"sha256 is to be {other}, but {sha256(b'# A model' + bytes([10]))}"):
        fetch("ann/model:README.md", tmp_path, sha256=other)
    assert names(tmp_path) == ["model.gguf"]
    with pytest.raises(CheckpointError, match=r"is no sha256\. Give its 64 hexadecimal digits"):
        fetch("ann/model:model.gguf", tmp_path, sha256="abc")


def test_a_hub_that_states_no_digest_needs_one(hub: Hub, tmp_path: Path) -> None:
    hub.states_digests = False
    with pytest.raises(CheckpointError, match=r"states no digest of it\. Give the one that it must have with --sha256"):
        fetch("ann/model:model.gguf", tmp_path)
    assert fetch("ann/model:model.gguf", tmp_path, sha256=sha256(SMALL)).downloaded


def test_a_file_that_is_there_is_not_downloaded_again(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fetch", "ann/model:model.gguf", "--out", str(tmp_path)]
    assert main(command) == 0
    hub.requests.clear()
    capsys.readouterr()
    assert main(command) == 0
    assert hub.downloads() == []
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'model.gguf'}\n"
    assert output.err == f"{len(SMALL)} bytes, sha256 {sha256(SMALL)}, was there and is not downloaded again\n"


def test_another_file_is_replaced_only_by_force(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"mine")
    command = ["fetch", "ann/model:model.gguf", "--out", str(tmp_path), "--quiet"]
    assert main(command) == 1
    assert "or replace it with --force." in capsys.readouterr().err
    assert (path.read_bytes(), hub.downloads()) == (b"mine", [])
    assert main([*command, "--force"]) == 0
    assert path.read_bytes() == SMALL
    path.unlink()
    path.mkdir()
    assert main([*command, "--force"]) == 1
    assert capsys.readouterr().err.endswith("Choose another folder with --out.\n")
    assert main(["fetch", "ann/model:model.gguf", "--out", str(folder := tmp_path / "new")]) == 0
    assert main(["fetch", "ann/model:model.gguf", "--out", str(folder / "model.gguf")]) == 1
    assert "is no folder. Choose another" in capsys.readouterr().err


@pytest.mark.usefixtures("hub")
def test_json_and_quiet_write_nothing_but_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # huggingface_hub then draws its bar for files and pipes too
    monkeypatch.chdir(tmp_path)
    assert main(["fetch", "ann/model:model.gguf"]) == 0
    output = capsys.readouterr()
    assert output.out == "model.gguf\n"
    assert "model.gguf: 100%" in output.err
    assert output.err.endswith(f"{len(SMALL)} bytes, sha256 {sha256(SMALL)}\n")
    assert main(["fetch", "ann/model:model.gguf", "--out", "quiet", "--quiet"]) == 0
    assert capsys.readouterr() == (f"{Path('quiet/model.gguf')}\n", "")
    assert main(["fetch", "ann/model:model.gguf", "--out", "json", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {
        "file": str(Path("json/model.gguf")),
        "bytes": len(SMALL),
        "sha256": sha256(SMALL),
        "repository": "ann/model",
        "revision": COMMIT,
    }
    assert "100%" in output.err  # --quiet was for that once


@pytest.mark.usefixtures("hub")
def test_unknown_names_are_answered_by_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such repository, or it is private\. Check the name, or log in"):
        fetch("ann/other:model.gguf", tmp_path)
    with pytest.raises(CheckpointError, match=rf"'modell\.gguf' at revision {COMMIT}\. Give one .*: model\.gguf, "):
        fetch("ann/model:modell.gguf", tmp_path)
    with pytest.raises(CheckpointError, match=r"no revision 'v9'\. Give a branch, a tag or a commit of http"):
        fetch("ann/model:model.gguf", tmp_path, revision="v9")
    models = r"ann/model:model\.gguf, ann/model:quantised/big file\.gguf\.$"
    with pytest.raises(CheckpointError, match=rf"no file of it is named\. Give one of its models: {models}"):
        fetch("ann/model", tmp_path)
    assert names(tmp_path) == []


def test_a_gated_repository_needs_terms_and_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.access = "gated"
    terms = rf"is gated.*\. Accept them at {hub.address}/ann/model, then log in with `hf auth login` or set HF_TOKEN\."
    with pytest.raises(CheckpointError, match=terms):
        fetch("ann/model:model.gguf", tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch("ann/model:model.gguf", tmp_path).downloaded
    for access, message in (("private", "or it is private. Check"), ("forbidden", r"refuses access \(403 the token")):
        hub.access = access
        with pytest.raises(CheckpointError, match=message):
            fetch("ann/model:model.gguf", tmp_path / access)


@pytest.mark.usefixtures("hub")
def test_without_a_hub_the_way_by_hand_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {
        "odd/page": "JSONDecodeError",
        "odd/model": "ValueError: it names no commit",
        "busy/model": "503 over cap",
    }
    for name, reason in answers.items():
        with pytest.raises(CheckpointError, match=rf"/api/models/{name} did not answer as a hub does \({reason}"):
            fetch(f"{name}:model.gguf", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", closed)
    monkeypatch.chdir(tmp_path)
    assert main(["fetch", "ann/model:quantised/big file.gguf", "--revision", "v1"]) == 1
    path, error = tmp_path / "big file.gguf", capsys.readouterr().err
    assert f"{closed}/api/models/ann/model/revision/v1 did not answer" in error
    assert "Connection refused" in error
    assert f"download {closed}/ann/model/resolve/v1/quantised/big%20file.gguf elsewhere, put it at {path} and" in error
    assert f"go on with `ruvltra-export bundle '{path}' --out DIR`." in error
    assert main(["fetch", "ann/model"]) == 1
    assert f"or look at {closed}/ann/model/tree/main elsewhere and give OWNER/NAME:FILE." in capsys.readouterr().err
    assert names(tmp_path) == []


def test_offline_is_said_and_no_tool_of_the_export_is_loaded(hub: Hub, tmp_path: Path) -> None:
    program = f"""
import sys
from export.cli import main
status = main(["fetch", "ann/model:model.gguf", "--out", {str(tmp_path)!r}])
print(status, *{{"torch", "transformers", "onnx", "coremltools"}} & set(sys.modules))
"""
    for offline, status in (("1", "1"), ("0", "0")):
        environment = {**os.environ, "HF_HUB_OFFLINE": offline}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.split()[-1] == status
        if offline == "1":
            assert f"is set, and {hub.address}/api/models/ann/model is not asked. Unset it, or download" in done.stderr
            assert f"put it at {tmp_path / 'model.gguf'} and go on with `ruvltra-export bundle " in done.stderr
            assert hub.requests == []


def test_a_full_disk_is_said_before_and_during_the_download(hub: Hub, tmp_path: Path) -> None:
    limited = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from export.cli import main
raise SystemExit(main(["fetch", "ann/model:quantised/big file.gguf", "--out", {str(tmp_path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"{tmp_path}: File too large after {1 << 20} of {len(WEIGHTS)} bytes. Make room and run" in done.stderr
    assert fetch("ann/model:quantised/big file.gguf", tmp_path).file.read_bytes() == WEIGHTS
    assert hub.downloads()[-1] == f"bytes={1 << 20}-"
    hub.requests.clear()
    hub.stated_size = 1 << 60
    with pytest.raises(CheckpointError, match=rf"needs {1 << 60} bytes, \d+ are free\. Make room, or choose"):
        fetch("ann/model:model.gguf", tmp_path)
    assert hub.downloads() == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("model.gguf", "names no repository"),
        ("", "names no repository"),
        ("model:model.gguf", "names no repository"),
        ("a/b/c:model.gguf", "names no repository"),
        ("../model:model.gguf", "names no repository"),
        ("ann/..:model.gguf", "names no repository"),
        ("ann/a--b:model.gguf", "names no repository"),
        ("ann/model.git:model.gguf", "names no repository"),
        ("https://huggingface.co/ann/model:model.gguf", "names no repository"),
        ("ann/model:", "is no path"),
        ("ann/model:a:b", "is no path"),
        ("ann/model:/etc/passwd", "is no path"),
        ("ann/model:../model.gguf", "is no path"),
        ("ann/model:a/../../model.gguf", "is no path"),
        ("ann/model:a/./model.gguf", "is no path"),
        ("ann/model:folder/", "is no path"),
        ("ann/model:a\\model.gguf", "is no path"),
        ("ann/model:a\nb", "is no path"),
    ],
)
def test_names_are_checked_before_anything_is_asked(hub: Hub, tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{message}[^.]*( '\.\.')?[^.]*\. Give OWNER/NAME:FILE"):
        fetch(source, tmp_path)
    assert (hub.requests, names(tmp_path)) == ([], [])


def test_an_empty_revision_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"revision is empty\. Give a branch"):
        fetch("ann/model:model.gguf", tmp_path, revision=" ")


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"^ruvltra-export fetch needs .* pip install 'ruvltra-edge\[hub\]'$"):
        fetch("ann/model:model.gguf", tmp_path)
