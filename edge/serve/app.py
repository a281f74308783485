"""The application: what may come in, what is done with it, and what goes out."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import html
import json
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Message, Receive, Scope, Send

from edge import __version__
from edge.address import LOOPBACK
from edge.bundle import Bundle
from edge.encoder import Encoder
from edge.errors import EdgeError, InputError
from edge.memory import Match, MemoryStore, Record
from edge.router import Router
from edge.serve import Limits
from edge.serve.batching import Batcher
from edge.serve.bodies import Add, Embeddings, Name, Route, Search

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)
_FEW = 8  # texts whose client is not watched while they are worked on
_QUIET = ("/healthz", "/metrics")  # asked every few seconds, and not logged
_OPEN = ("/healthz",)  # needs no token
_UNREAD = (401, 403, 404, 405, 408, 413, 415, 503)  # answers to requests whose body may not have been read
_PATIENCE = 16  # times as much as a body may have is let come in
_GONE = 499  # nginx's status for a client that has left; nobody receives it


class Problem(Exception):
    """An answer other than 200: its status, what is wrong and what to do, and what of the body it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def error_document(problem: Problem) -> dict[str, Any]:
    """An error as OpenAI's API has it."""
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    return {"error": {"message": problem.message, "type": kind, "param": problem.param, "code": problem.code}}


class Endpoint(NamedTuple):
    """A path, what it does, and what its body holds."""

    method: str
    path: str
    what: str
    handler: Callable[[Request], Awaitable[Response]]
    body: type[BaseModel] | None = None
    example: dict[str, Any] | None = None


class App:
    """The ASGI application.

    Attributes:
        ending: Answers close their connections, as the server is about to end.
    """

    def __init__(
        self,
        bundle: Bundle,
        router: Router,
        encoder: Encoder,
        store: MemoryStore | None,
        token: str | None,
        host: str,
        limits: Limits,
        log: bool = False,
    ) -> None:
        """Put the parts together.

        Args:
            bundle: Named by ``/v1/models``.
            router: Decides.
            encoder: Embeds.
            store: None: there is no ``/v1/memory``.
            token: What requests must bear; None for nothing.
            host: The address that is listened at; on that of this machine alone, other names for it are refused.
            limits: What requests may take.
            log: Write a JSON line for each request to standard error.
        """
        self.ending = False
        self._bundle = bundle
        self._router = router
        self._encoder = encoder
        self._store = store
        self._token = None if token is None else token.encode()
        self._local = host in LOOPBACK and token is None
        self._limits = limits
        self._log = log
        self._began = int(time.time())
        self._models = (bundle.name, f"{bundle.name}-{bundle.version}", bundle.id)
        self._meters = Meters(lambda: self._batcher.waiting)
        self._batcher = Batcher(encoder, limits.batch, limits.wait_seconds, self._meters.batch.observe)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="ruvltra-memory")
        self._at_work = 0
        self._endpoints = self._listed()
        self._paths = {each.path: each for each in self._endpoints}

    def _listed(self) -> list[Endpoint]:
        decision = {"index": 0, "agent": "debugger", "method": "hybrid", "confidence": 0.98, "margin": 0.97}
        record = {"id": "a1", "text": "Sessions live in Redis", "metadata": {}, "namespace": "default"}
        return [
            Endpoint("GET", "/", "This list.", self._docs),
            Endpoint("GET", "/docs", "This list.", self._docs),
            Endpoint("GET", "/openapi.json", "It, for programs.", self._openapi),
            Endpoint("GET", "/healthz", "200 while requests are taken, 503 before the end.", self._health),
            Endpoint("GET", "/metrics", "What has been done, for Prometheus.", self._metrics),
            Endpoint("GET", "/v1/models", "The bundle.", self._list),
            Endpoint("POST", "/v1/embeddings", "Embed texts, as OpenAI's API does.", self._embed, Embeddings,
                     {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.1]}],
                      "model": "ruvltra-mini", "usage": {"prompt_tokens": 7, "total_tokens": 7}}),
            Endpoint("POST", "/v1/route", "Decide which agent takes each task.", self._route, Route,
                     {"object": "list", "data": [decision], "model": "ruvltra-mini"}),
            Endpoint("POST", "/v1/memory/add", "Remember texts.", self._add, Add, {"ids": ["a1"]}),
            Endpoint("POST", "/v1/memory/search", "Find them.", self._search, Search,
                     {"matches": [{"record": record, "score": 0.6, "cosine": 0.6, "words": 0.5}]}),
            Endpoint("POST", "/v1/memory/get", "One of them.", self._get, Name, {"record": record}),
            Endpoint("POST", "/v1/memory/delete", "Forget one.", self._delete, Name, {"deleted": True}),
        ]  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever happens."""
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        name = os.urandom(8).hex()
        path = scope["path"] if scope["path"] in self._paths else "other"
        status = 0
        more = True
        scope["state"] = {"texts": 0}

        async def take() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", name.encode()), (b"x-content-type-options", b"nosniff")]
                if self.ending or status in _UNREAD:
                    extra.append((b"connection", b"close"))
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        self._at_work += 1
        try:
            try:
                self._check(scope)
                response = await self._endpoint(scope).handler(Request(scope, take))
                await response(scope, take, answer)
            except Exception as error:
                if status:  # too late for another answer
                    raise
                problem = self._problem(error)
                if more and problem.status != 408:  # which has waited already
                    await self._drain(scope, take)
                await _json(error_document(problem), problem.status, _headers(problem))(scope, take, answer)
        finally:
            self._at_work -= 1
            seconds = time.perf_counter() - started
            self._meters.count(path, status or _GONE, seconds, scope["state"]["texts"])
            if self._log and path not in _QUIET:
                self._log_line(name, scope, path, status or _GONE, seconds)

    def _endpoint(self, scope: Scope) -> Endpoint:
        found = self._paths.get(scope["path"])
        if found is None:
            raise Problem(404, "there is no such path. Look at /docs.")
        if scope["method"] != found.method:
            raise Problem(405, f"this path takes {found.method} alone. Look at /docs.")
        return found

    def _log_line(self, name: str, scope: Scope, path: str, status: int, seconds: float) -> None:
        line = {
            "time": round(time.time(), 3),
            "id": name,
            "method": scope["method"][:16],
            "path": path,
            "status": status,
            "ms": round(1000 * seconds, 2),
            "texts": scope["state"]["texts"],
        }
        try:
            print(json.dumps(line), file=sys.stderr, flush=True)
        except OSError:  # nobody reads it any more, which is no reason to fail
            self._log = False

    def _check(self, scope: Scope) -> None:
        """Whether a request may come in."""
        headers = dict(scope["headers"])
        path = scope["path"]
        if self._local:
            host = headers.get(b"host", b"").rsplit(b":", 1)[0].strip(b"[]").decode("latin-1")
            if host not in LOOPBACK:  # a web page whose name leads here
                raise Problem(403, "this server is for this machine alone. Use the address 127.0.0.1.")
        if self._token is not None and path not in _OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                raise Problem(
                    401,
                    "the token is missing or wrong. Send the header: Authorization: Bearer TOKEN",
                    code="invalid_api_key",
                )
        if self._at_work > self._limits.requests and path not in _QUIET:
            raise Problem(503, "too many requests are being worked on. Come again in a second.", code="overloaded")

    def _problem(self, error: Exception) -> Problem:
        if isinstance(error, Problem):
            return error
        if isinstance(error, InputError):
            return Problem(400, str(error))
        if isinstance(error, ClientDisconnect):
            return Problem(_GONE, "the client has gone. Send the request again.")
        if isinstance(error, EdgeError):
            return Problem(500, str(error))
        with contextlib.suppress(OSError):
            # Where, and what kind; its words may quote a text.
            place = traceback.extract_tb(error.__traceback__)[-1]
            print(f"ruvltra: {type(error).__name__} at {place.filename}:{place.lineno}", file=sys.stderr, flush=True)
        return Problem(500, "the server failed at this. Its log says more.")

    async def _body(self, request: Request, kind: type[B]) -> B:
        """A request's body, within its limits, checked."""
        stated = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if stated != "application/json":  # what a web page may not send without being asked
            raise Problem(415, "the body is not stated to be JSON. Send the header: Content-Type: application/json")
        data = await self._read(request)
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise _invalid(error) from None

    async def _read(self, request: Request) -> bytes:
        """A body."""
        most, seconds = self._limits.body, self._limits.body_seconds
        parts, size = [], 0
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise Problem(
                            413, f"the body has more than {most} bytes. Send less at a time.", code="too_large"
                        )
                    parts.append(part)
        except TimeoutError:
            raise Problem(408, f"the body did not come in within {seconds:g} seconds. Send it at once.") from None
        return b"".join(parts)

    async def _drain(self, scope: Scope, receive: Receive) -> None:
        """Let the rest of a body come in, and forget it: a client that is still sending would not read the answer."""
        headers = dict(scope["headers"])
        most = _PATIENCE * self._limits.body
        if b"expect" in headers or int(headers.get(b"content-length", b"0")[:18]) > most:
            return  # it has not begun to send, or would take too long
        size, more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.body_seconds):
                while more and size <= most:
                    message = await receive()
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)

    def _texts(self, request: Request, given: str | list[str], param: str) -> list[str]:
        texts = [given] if isinstance(given, str) else given
        limits = self._limits
        if not texts:
            raise Problem(400, f"{param} is an empty list. Give at least one text.", param)
        if len(texts) > limits.items:
            raise Problem(
                400, f"{param} has {len(texts)} texts, the limit is {limits.items}. Send fewer at a time.", param
            )
        longest = max(map(len, texts))
        if longest > limits.characters:
            raise Problem(
                400, f"a text has {longest} characters, the limit is {limits.characters}. Send its beginning.", param
            )
        request.scope["state"]["texts"] = len(texts)
        return texts

    def _check_model(self, model: str | None) -> None:
        if model is not None and model not in self._models:
            raise Problem(
                404, f"there is no model {model[:100]!r} here. Use {self._bundle.name!r}.", "model", "model_not_found"
            )

    async def _batched(self, request: Request, function: Callable[[str], T], texts: Sequence[str]) -> list[T]:
        """Run a function on texts, with those of other requests; not to the end if the client leaves."""
        if len(texts) <= _FEW:
            return await self._batcher.each(function, texts)
        work = asyncio.ensure_future(self._batcher.each(function, texts))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        finally:
            work.cancel()
            gone.cancel()

    async def _embed(self, request: Request) -> Response:
        body = await self._body(request, Embeddings)
        self._check_model(body.model)
        texts = self._texts(request, body.input, "input")
        if body.dimensions not in (None, self._encoder.dim):
            raise Problem(
                400,
                f"the model has {self._encoder.dim} dimensions and was not trained to have {body.dimensions}. Leave "
                "dimensions out.",
                "dimensions",
            )
        found = await self._batched(request, self._vector, texts)
        tokens = sum(count for _, count in found)
        written = _base64 if body.encoding_format == "base64" else _floats
        data = [
            {"object": "embedding", "index": place, "embedding": written(vector)}
            for place, (vector, _) in enumerate(found)
        ]
        return _json(self._list_of(data, tokens))

    def _vector(self, text: str) -> tuple[NDArray[np.float32], int]:
        tokens = self._encoder.tokenize(text)
        return self._encoder.encode_tokens(tokens), len(tokens.ids)

    async def _route(self, request: Request) -> Response:
        body = await self._body(request, Route)
        self._check_model(body.model)
        texts = self._texts(request, body.input, "input")
        strategy = body.strategy or self._router.strategy
        if self._router.strategy == "generate" != strategy:
            raise Problem(400, "this server decides by a language model alone. Leave strategy out.", "strategy")
        decided = await self._batched(
            request, lambda task: self._router.decide(self._router.signals(task), strategy), texts
        )
        return _json(
            self._list_of([{"index": place} | one.document(body.top) for place, one in enumerate(decided)], None)
        )

    def _list_of(self, data: list[dict[str, Any]], tokens: int | None) -> dict[str, Any]:
        found: dict[str, Any] = {"object": "list", "data": data, "model": self._bundle.name}
        return found if tokens is None else found | {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}}

    async def _in_thread(self, function: Callable[[MemoryStore], T]) -> T:
        """Use the store, which waits for the disk."""
        if self._store is None:
            raise Problem(404, "there is no memory here. Start the server with --memory DIR.")
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, self._store)

    async def _add(self, request: Request) -> Response:
        body = await self._body(request, Add)
        self._texts(request, [record.text for record in body.records], "records")
        records = [record.model_dump() for record in body.records]
        return _json({"ids": await self._in_thread(lambda store: store.add_many(records, replace=body.replace))})

    async def _search(self, request: Request) -> Response:
        body = await self._body(request, Search)
        self._texts(request, body.query, "query")
        arguments = body.model_dump(exclude={"query", "k"})
        matches = await self._in_thread(lambda store: store.search(body.query, body.k, **arguments))
        return _json({"matches": [_match(match) for match in matches]})

    async def _get(self, request: Request) -> Response:
        body = await self._body(request, Name)
        record = await self._in_thread(lambda store: store.get(body.id, namespace=body.namespace))
        if record is None:
            raise Problem(404, f"there is no record {body.id!r} in {body.namespace!r}. Add it first.", "id")
        return _json({"record": record._asdict()})

    async def _delete(self, request: Request) -> Response:
        body = await self._body(request, Name)
        return _json({"deleted": await self._in_thread(lambda store: store.delete(body.id, namespace=body.namespace))})

    async def _list(self, _: Request) -> Response:
        model = {"id": self._bundle.name, "object": "model", "created": self._began, "owned_by": "ruvltra-edge"}
        known = {
            "version": self._bundle.version,
            "dimensions": self._encoder.dim,
            "max_tokens": self._encoder.max_length,
        }
        return _json({"object": "list", "data": [model | known | {"bundle": self._bundle.id}]})

    async def _health(self, _: Request) -> Response:
        return _json({"status": "ending" if self.ending else "ok"}, 503 if self.ending else 200)

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._meters.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, _: Request) -> Response:
        return _json(self.openapi())

    async def _docs(self, _: Request) -> Response:
        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(_page(self._bundle, self._endpoints), headers=policy)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, of the same descriptions that requests are checked by."""
        schemas: dict[str, Any] = {}
        paths: dict[str, Any] = {}
        for each in self._endpoints:
            told: dict[str, Any] = {"summary": each.what, "responses": {"200": {"description": "Done"}}}
            if each.example is not None:
                told["responses"]["200"]["content"] = {"application/json": {"example": each.example}}
            if each.body is not None:
                schema = each.body.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= schema.pop("$defs", {}) | {each.body.__name__: schema}
                reference = {"$ref": f"#/components/schemas/{each.body.__name__}"}
                told["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
                for status, what in ((400, "Something in the body"), (413, "Too large"), (503, "Too many requests")):
                    told["responses"][str(status)] = {"description": what}
            paths.setdefault(each.path, {})[each.method.lower()] = told
        found: dict[str, Any] = {
            "openapi": "3.1.0",
            "info": {"title": "ruvltra", "version": __version__},
            "paths": paths,
            "components": {"schemas": schemas},
        }
        if self._token is not None:
            found["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"bearer": []}]
        return found

    def close(self) -> None:
        """Let the threads end."""
        self._batcher.close()
        self._threads.shutdown()


class Meters:
    """What is counted for ``/metrics``."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("ruvltra_requests", "Requests", ("path", "status"), registry=self.registry)
        self._seconds = Histogram(
            "ruvltra_request_seconds",
            "Time for a request",
            ("path",),
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
            registry=self.registry,
        )
        self._texts = Counter("ruvltra_texts", "Texts of requests", registry=self.registry)
        self.batch = Histogram(
            "ruvltra_batch_texts",
            "Texts that were run together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        Gauge("ruvltra_waiting_texts", "Texts that are not begun", registry=self.registry).set_function(waiting)

    def count(self, path: str, status: int, seconds: float, texts: int) -> None:
        """A request that was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)
        if texts:
            self._texts.inc(texts)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _invalid(error: ValidationError) -> Problem:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[str]")) or None
    if first["type"] == "json_invalid":
        return Problem(400, f"the body is not valid JSON ({first['msg'].removeprefix('Invalid JSON: ')}). Correct it.")
    return Problem(400, f"{where or 'the body'}: {first['msg']}. Look at /docs for what it may be.", where)


def _headers(problem: Problem) -> dict[str, str]:
    if problem.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {"Retry-After": "1"} if problem.status == 503 else {}


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(body, status, headers, media_type="application/json")


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _floats(vector: NDArray[np.float32]) -> list[float]:
    values: list[float] = vector.tolist()
    return values


def _match(match: Match) -> dict[str, Any]:
    record: Record = match.record
    return match._asdict() | {"record": record._asdict()}


def _page(bundle: Bundle, endpoints: Sequence[Endpoint]) -> str:
    """A page that needs nothing from elsewhere, not even a script."""
    parts = []
    for each in endpoints:
        parts.append(f"<h2><code>{each.method} {each.path}</code></h2><p>{html.escape(each.what)}</p>")
        if each.body is not None:
            rows = "".join(
                f"<tr><td><code>{name}</code>{'' if field.is_required() else ' (optional)'}</td>"
                f"<td>{html.escape(field.description or '')}</td></tr>"
                for name, field in each.body.model_fields.items()
            )
            parts.append(f"<table>{rows}</table>")
        if each.example is not None:
            parts.append(f"<pre>{html.escape(json.dumps(each.example, indent=1))}</pre>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>ruvltra</title><style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;"
        "max-width:46rem;margin:2rem auto;padding:0 1rem}h2{font-size:1rem;margin-top:2rem}td{padding:.1rem 1rem "
        ".1rem 0;vertical-align:top}pre{overflow-x:auto;padding:.5rem;border:1px solid #8886;border-radius:6px}</style>"
        f"<h1>ruvltra {html.escape(__version__)}</h1><p>{html.escape(bundle.name)} {html.escape(bundle.version)}. "
        "The same for programs: <a href=openapi.json>openapi.json</a>.</p>" + "".join(parts)
    )
