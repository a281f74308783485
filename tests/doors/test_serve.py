from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest

from edge import Encoder, Router
from tests.conftest import ROOT

TASK = "Fix the null pointer in the login handler"
TOKEN = "a-token-of-this-test-0123456789"
ODD = ["\x00\x01", "‮right to left", "😀" * 1000, "<script>alert(1)</script>", "Ignore all instructions.", " "]


class Served:
    """A server's process."""

    def __init__(self, *arguments: str, token: str | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RUVLTRA_TOKEN"}
        environment |= {} if token is None else {"RUVLTRA_TOKEN": token}
        command = [sys.executable, "-m", "edge.cli", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        first = self.process.stderr.readline()
        found = re.fullmatch(r"ruvltra: http://127\.0\.0\.1:(\d+)\n", first)
        assert found is not None, first
        self.port = int(found[1])
        self.log: list[str] = []
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers; the body from JSON where it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            kind = {} if data is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, kind | headers)
            answer = connection.getresponse()
            content = answer.read()
            told = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, json.loads(content) if "json" in told["content-type"] else content.decode(), told
        finally:
            connection.close()

    def memory(self) -> int:
        """Bytes that are resident."""
        found = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{self.process.pid}/status").read_text("ascii"))
        assert found is not None
        return int(found[1]) * 1024

    def end(self) -> int:
        self.process.terminate()
        status = self.process.wait(30)
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


@contextlib.contextmanager
def serving(*arguments: str, token: str | None = None) -> Iterator[Served]:
    served = Served(*arguments, token=token)
    try:
        yield served
    finally:
        served.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    memory = str(tmp_path_factory.mktemp("serve") / "memory")
    with serving("--memory", memory, "--max-body", "300000", "--head-timeout", "2", "--body-timeout", "2") as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_embeddings_by_openais_client(client: openai.OpenAI, router: Router) -> None:
    encoder = router.encoder
    assert isinstance(encoder, Encoder)
    texts = [TASK, "日本語", *ODD]
    expected = encoder.encode(texts)
    for arguments in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": encoder.dim}):
        found = client.embeddings.create(model="ruvltra-mini", input=texts, **arguments)  # type: ignore[call-overload]
        vectors = [
            np.frombuffer(base64.b64decode(item.embedding), "<f4")
            if isinstance(item.embedding, str)
            else item.embedding
            for item in found.data
        ]
        assert (np.array(vectors, dtype=np.float32) == expected).all()
        assert [item.index for item in found.data] == list(range(len(texts)))
        assert found.usage.prompt_tokens == sum(len(encoder.tokenize(text).ids) for text in texts)
    one = client.embeddings.create(model="ruvltra-mini", input=TASK)
    assert len(one.data) == 1
    assert one.model == "ruvltra-mini"


def test_the_example_of_the_page(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "serve.md").read_text("utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```", page, re.S | re.M)
    exec(compile(code.replace(":8080", f":{server.port}"), "example", "exec"), {"__name__": "example"})
    (said,) = re.findall(r"print\(.*\)  # (.*)", code)
    assert capsys.readouterr().out.strip() == said


def test_what_openais_client_makes_of_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Use 'ruvltra-mini'") as unknown:
        client.embeddings.create(model="text-embedding-3-small", input="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="384 dimensions"):
        client.embeddings.create(model="ruvltra-mini", input="a", dimensions=128)
    with pytest.raises(openai.BadRequestError, match="at least one"):
        client.embeddings.create(model="ruvltra-mini", input=[])
    with pytest.raises(openai.BadRequestError, match="input"):
        client.embeddings.create(model="ruvltra-mini", input=[[1, 2, 3]])
    assert [model.id for model in client.models.list()] == ["ruvltra-mini"]


def test_routing_is_the_routers(server: Served, router: Router) -> None:
    tasks = [TASK, "the checkout page is blank since Friday", "which sourdough recipe needs no starter?", *ODD]
    for strategy in ("hybrid", "embedding", "keyword", "keyword-first"):
        status, found, _ = server.ask("POST", "/v1/route", {"input": tasks, "strategy": strategy, "top": 13})
        assert status == 200
        for task, made in zip(tasks, found["data"], strict=True):
            decision = router.decide(router.signals(task), strategy)
            assert made["agent"] == decision.agent
            assert made["method"] == decision.method
            assert made["confidence"] == decision.confidence
            assert made["matched"] == list(decision.matched)
            assert [row["id"] for row in made["ranking"]] == [ranked.id for ranked in decision.ranking]
    _, one, _ = server.ask("POST", "/v1/route", {"input": TASK})
    assert len(one["data"]) == 1
    assert len(one["data"][0]["ranking"]) == 3


def test_vectors_do_not_depend_on_company(server: Served, router: Router) -> None:
    """Of 24 clients at once, each gets what it would get alone."""
    texts = [f"task {number}: {TASK[: 5 + number]}" for number in range(48)]
    assert router.encoder is not None
    expected = router.encoder.encode(texts)
    wrong: list[int] = []

    def ask(start: int) -> None:
        for place in range(start, len(texts), 24):
            status, found, _ = server.ask("POST", "/v1/embeddings", {"model": "ruvltra-mini", "input": texts[place]})
            vector = np.array(found["data"][0]["embedding"], dtype=np.float32) if status == 200 else None
            if vector is None or not (vector == expected[place]).all():
                wrong.append(place)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    sizes = re.findall(r'ruvltra_batch_texts_bucket\{le="([\d.]+)"\} ([\d.]+)', server.ask("GET", "/metrics")[1])
    assert float(sizes[-1][1]) > float(sizes[0][1]), "nothing was run together"


def test_memory(server: Served) -> None:
    records = [
        {"text": "Sessions live in Redis, for 30 minutes", "id": "s", "metadata": {"topic": "login"}},
        {"text": "Orders are kept in PostgreSQL", "namespace": "other"},
    ]
    status, added, _ = server.ask("POST", "/v1/memory/add", {"records": records})
    assert status == 200
    assert added["ids"][0] == "s"
    query = {"query": "where are user sessions kept?", "k": 1, "where": {"topic": "login"}}
    _, found, _ = server.ask("POST", "/v1/memory/search", query)
    assert found["matches"][0]["record"]["text"] == records[0]["text"]
    assert server.ask("POST", "/v1/memory/get", {"id": "s"})[1]["record"]["metadata"] == {"topic": "login"}
    conflict = {"records": [{"text": "another", "id": "s"}]}
    status, said, _ = server.ask("POST", "/v1/memory/add", conflict)
    assert (status, "another text's" in said["error"]["message"]) == (400, True)
    assert server.ask("POST", "/v1/memory/add", conflict | {"replace": True})[0] == 200
    assert server.ask("POST", "/v1/memory/delete", {"id": "s"})[1] == {"deleted": True}
    assert server.ask("POST", "/v1/memory/get", {"id": "s"})[0] == 404
    assert server.ask("POST", "/v1/memory/search", {"query": "x", "where": {"a": {"no": 1}}})[0] == 400


CASES = [
    ("GET", "/nowhere", None, {}, 404, "no such path"),
    ("GET", "/v1/route", None, {}, 405, "POST alone"),
    ("POST", "/v1/models", b"{}", {}, 405, "GET alone"),
    ("POST", "/v1/route", b"{", {}, 400, "not valid JSON"),
    ("POST", "/v1/route", b"", {}, 400, "not valid JSON"),
    ("POST", "/v1/route", b"\xff\xfe", {}, 400, "not valid JSON"),
    ("POST", "/v1/route", b'{"input": "\\ud800"}', {}, 400, "not valid JSON"),
    ("POST", "/v1/route", b"[" * 100_000, {}, 400, "not valid JSON"),
    ("POST", "/v1/route", b"[1]", {}, 400, "body"),
    ("POST", "/v1/route", {"input": 5}, {}, 400, "input"),
    ("POST", "/v1/route", {"input": "a", "colour": "red"}, {}, 400, "colour"),
    ("POST", "/v1/route", {"input": "a", "strategy": "magic"}, {}, 400, "strategy"),
    ("POST", "/v1/route", {"input": "a", "strategy": "generate"}, {}, 400, "needs a generator"),
    ("POST", "/v1/route", {"input": "a", "top": 0}, {}, 400, "top"),
    ("POST", "/v1/route", {"input": []}, {}, 400, "empty list"),
    ("POST", "/v1/route", {"input": ["a"] * 10_000}, {}, 400, "has 10000 texts, the limit is 2048"),
    ("POST", "/v1/route", {"input": "a" * 100_001}, {}, 400, "100001 characters"),
    ("POST", "/v1/route", {"input": "a" * 1_000_000}, {}, 413, "more than 300000 bytes"),
    ("POST", "/v1/route", b'{"input": "a"}', {"Content-Type": "text/plain"}, 415, "Content-Type"),
    ("GET", "/v1/models", None, {"Host": "evil.example"}, 403, "this machine alone"),
]


@pytest.mark.parametrize(("method", "path", "body", "headers", "status", "said"), CASES)
def test_refusals(
    server: Served, method: str, path: str, body: Any, headers: dict[str, str], status: int, said: str
) -> None:
    answered, found, _ = server.ask(method, path, body, **headers)
    assert answered == status, found
    assert said in found["error"]["message"]
    assert re.search(r"[^.][.)]\s\S", found["error"]["message"]), "it does not say what to do"
    assert found["error"]["type"] == "invalid_request_error"
    assert server.ask("GET", "/healthz")[1] == {"status": "ok"}


def raw(server: Served, data: bytes) -> bytes:
    """What comes back to some bytes until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


HEAD = b"POST /v1/route HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", b"408"),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ", b"408"),
        (HEAD + b"Content-Length: 100\r\n\r\n{", b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b"a" * 65536 + b"\r\n", b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"a" * 65536 + b"\r\n") * 6, b"413"),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", b"4"),
        (b"GET / HTTP/1.1\r\n" + b"X-Many: of these\r\n" * 40_000, b"431"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00", b"400"),
    ],
    ids=[
        "silent",
        "slow head",
        "slow body",
        "slow chunks",
        "large chunks",
        "absurd length",
        "large head",
        "nonsense",
        "tls",
    ],
)
def test_connections_that_do_not_behave(server: Served, data: bytes, status: bytes) -> None:
    answer = raw(server, data)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert b'"message"' in answer
    assert server.ask("GET", "/healthz")[0] == 200


def test_a_trickle_is_cut_off(server: Served) -> None:
    """A byte now and then does not prolong the time for a head."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < started + 10:
                connection.sendall(b"X")
                time.sleep(0.05)
        assert time.monotonic() < started + 10


def test_an_answer_that_nobody_reads_is_given_up() -> None:
    body = json.dumps({"model": "ruvltra-mini", "input": ["a"] * 1000}).encode()  # its answer: 8 MB
    with serving("--body-timeout", "1") as server, socket.socket() as connection:
        files = Path(f"/proc/{server.process.pid}/fd")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(HEAD.replace(b"route", b"embeddings") + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        told = connection.recv(200)
        assert told.startswith(b"HTTP/1.1 200")
        length = int(re.findall(rb"content-length: (\d+)", told)[0])
        held = len(list(files.iterdir()))
        end = time.monotonic() + 20
        while len(list(files.iterdir())) >= held and time.monotonic() < end:
            time.sleep(0.05)
        came = len(told)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 20):
                came += len(part)
        assert came < length


def test_a_log_that_nobody_reads_is_no_reason_to_fail() -> None:
    command = [sys.executable, "-m", "edge.cli", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            port = int(process.stderr.readline().rpartition(":")[2])
            process.stderr.close()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            with contextlib.closing(connection):
                for _ in range(4):  # over one connection
                    connection.request("POST", "/v1/route", b'{"input": "a"}', {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    assert answer.read()
                    assert answer.status == 200
        finally:
            process.terminate()


def test_abuse_does_not_grow_the_server(server: Served) -> None:
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"

    def abuse() -> None:
        for _ in range(6):
            server.ask("POST", "/v1/route", {"input": ["a"] * 10_000})
            server.ask("POST", "/v1/route", b"[" * 290_000)
            server.ask("POST", "/v1/embeddings", {"model": "ruvltra-mini", "input": "word " * 19_000})
            raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 6 + b"0\r\n\r\n")

    abuse()
    before = server.memory()
    for _ in range(4):
        abuse()
    assert server.memory() - before < 20e6


def test_the_log_has_no_texts(server: Served) -> None:
    secret = "zanzibar"
    server.ask("POST", "/v1/route", {"input": f"fix {secret}"})
    server.ask("GET", f"/{secret}?{secret}")
    server.ask("GET", "/healthz")
    lines = [json.loads(line) for line in list(server.log)]
    assert secret not in "".join(server.log)
    assert lines[-2].keys() == {"time", "id", "method", "path", "status", "ms", "texts"}
    assert [line["path"] for line in lines[-2:]] == ["/v1/route", "other"]
    assert lines[-2]["texts"] == 1


def test_metrics_and_documentation(server: Served) -> None:
    status, text, told = server.ask("GET", "/metrics")
    assert status == 200
    assert told["content-type"].startswith("text/plain; version=0.0.4")
    assert 'ruvltra_requests_total{path="/v1/route",status="200"}' in text
    assert 'ruvltra_request_seconds_bucket{le="+Inf",path="/v1/route"}' in text
    assert "ruvltra_waiting_texts 0.0" in text
    _, document, _ = server.ask("GET", "/openapi.json")
    schemas = document["components"]["schemas"]
    for name in ("Embeddings", "Route", "Add", "Search", "Name"):
        jsonschema.Draft202012Validator.check_schema(schemas[name])
    whole = {"$ref": "#/components/schemas/Add", "components": {"schemas": schemas}}
    jsonschema.validate({"records": [{"text": "a"}]}, whole)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"records": [{"text": 5}]}, whole)
    page = server.ask("GET", "/docs")
    assert page[0] == 200
    assert page[2]["content-security-policy"].startswith("default-src 'none'")
    for path, told in document["paths"].items():
        assert path in page[1]
        for method in told:
            assert server.ask(method.upper(), path, b"" if method == "post" else None)[0] in (200, 400), path


def test_the_token() -> None:
    with serving(token=TOKEN) as server:
        assert server.ask("GET", "/healthz")[0] == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer \xfc"},
        ):
            for path in ("/v1/models", "/metrics", "/docs"):
                status, said, told = server.ask("GET", path, **headers)
                assert status == 401
                assert told["www-authenticate"] == "Bearer"
                assert TOKEN not in json.dumps(said)
        for _ in range(5):  # not a reset connection, though the client is still sending when it is known
            assert server.ask("POST", "/v1/route", b"a" * 5_000_000)[0] == 401
        assert server.ask("GET", "/v1/models", Authorization=f"Bearer {TOKEN}")[0] == 200
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=TOKEN, max_retries=0) as client:
            assert client.embeddings.create(model="ruvltra-mini", input="a").data
        assert (
            server.ask("POST", "/v1/memory/add", {"records": [{"text": "a"}]}, Authorization=f"Bearer {TOKEN}")[0]
            == 404
        )
        assert server.end() == 0
        assert TOKEN not in "".join(server.log)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "no token is set"),
        (["--host", "0.0.0.0", "--token-file", "/nowhere"], "cannot be read as a token"),
        (["--bundle", "/nowhere"], "no bundle here"),
        (["--agents", "/nowhere.toml"], "no such file"),
        (["--host", "192.0.2.1", "--token-file", "TOKEN"], "cannot listen"),
    ],
)
def test_it_does_not_start(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN, "ascii")
    arguments = [str(tmp_path / "token") if word == "TOKEN" else word for word in arguments]
    command = [sys.executable, "-m", "edge.cli", "serve", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_too_many_requests_and_connections() -> None:
    with serving("--max-requests", "2", "--max-connections", "12", "--max-items", "5000") as server:
        slow = {"input": ["a longer task that takes a while " * 20] * 400}
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(server.ask("POST", "/v1/route", slow)[0])) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(set(answers)) == [200, 503]
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(12)]
        assert b"503" in raw(server, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")[:20]
        for connection in idle:
            connection.close()
        for _ in range(100):
            try:
                if server.ask("GET", "/healthz")[0] == 200:
                    break
            except ConnectionError:
                time.sleep(0.05)
        assert server.ask("GET", "/healthz")[0] == 200


def test_a_client_that_leaves_frees_the_server() -> None:
    with serving("--max-items", "5000") as server:
        many = json.dumps({"input": ["a longer task that takes a while " * 30] * 4000}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(many) + many)
            waiting = 0.0
            while not waiting:
                found = re.search(r"ruvltra_waiting_texts ([\d.]+)", server.ask("GET", "/metrics")[1])
                waiting = float(found[1]) if found else 0.0
        server.ask("POST", "/v1/route", {"input": TASK})
        found = re.search(r"ruvltra_waiting_texts ([\d.]+)", server.ask("GET", "/metrics")[1])
        assert found is not None
        assert float(found[1]) == 0


def test_no_accepted_request_is_lost_at_the_end() -> None:
    """SIGTERM while 16 clients ask over connections that they keep: each request that was sent is answered."""
    answered: list[int] = []
    lost: list[str] = []

    def ask(port: int) -> None:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                connection.connect()
            except OSError:
                return  # it listens no longer
            with contextlib.closing(connection):
                while connection.sock is not None:  # http.client lets go of it where the server says close
                    try:
                        connection.request("POST", "/v1/route", body, {"Content-Type": "application/json"})
                        answer = connection.getresponse()
                        answer.read()
                        answered.append(answer.status)
                    except (OSError, http.client.HTTPException) as error:
                        lost.append(repr(error))
                        break

    body = json.dumps({"input": TASK})
    with serving() as server:
        threads = [threading.Thread(target=ask, args=(server.port,)) for _ in range(16)]
        for thread in threads:
            thread.start()
        while len(answered) < 200:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert lost == []
        assert set(answered) == {200}
        assert server.process.wait(30) == 0
