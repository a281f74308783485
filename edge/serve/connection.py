"""Connections: how long a request's head may take, how many there may be, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from edge.serve import Limits
from edge.serve.app import App, Problem, error_document

_LINGER = 0.3  # seconds in which requests that are under way to an open connection still come in
_END = 30.0  # seconds for what is being worked on when the signal comes


def run(app: App, listening: socket.socket, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT; requests that were accepted are answered."""

    class Protocol(_Connection):
        seconds = limits.head
        most = limits.connections

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="critical",
        server_header=False,
        timeout_graceful_shutdown=int(_END),
    )
    _Server(config, app, limits.grace, listening).run(sockets=[listening.dup()])


class _Server(uvicorn.Server):
    """Ends in steps: answers close their connections, then nothing new is accepted, then idle connections close."""

    def __init__(self, config: uvicorn.Config, app: App, grace: float, listening: socket.socket) -> None:
        super().__init__(config)
        self._app = app
        self._listening = listening
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's signature)
        if self._app.ending or self._loop is None:  # the second time: at once
            self.should_exit = self.force_exit = True
            return
        self._app.ending = True
        self._loop.call_soon_threadsafe(self._loop.call_later, self._grace, self._leave)

    def _leave(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listening in sockets or []:
            listening.close()
        await asyncio.sleep(_LINGER)  # what is being worked on ends, so that nothing comes between the next two steps
        await self._take_the_rest()
        await asyncio.sleep(_LINGER)
        await super().shutdown(sockets)
        self._app.close()

    async def _take_the_rest(self) -> None:
        """Stop listening, and serve the connections that the system had made by then, which would be reset."""
        waiting = []
        self._listening.setblocking(False)
        with contextlib.suppress(OSError):
            while True:
                waiting.append(self._listening.accept()[0])
        self._listening.close()  # at once, so that no further one is made between
        loop = asyncio.get_running_loop()
        kind: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        for connection in waiting:
            connection.setblocking(False)
            await loop.connect_accepted_socket(
                lambda: kind(config=self.config, server_state=self.server_state, app_state={}), connection
            )


class _Connection(HttpToolsProtocol):
    """Refuses a connection too many, and closes one whose request does not come in."""

    seconds: float
    most: int
    _deadline: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(503, "there are too many connections. Come again later.")
            return
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def on_message_begin(self) -> None:
        if self._deadline is None:
            self._expect()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._forget()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's signature)
        self._forget()
        self._refuse(400, "this is no HTTP request. Look at /docs.")

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(self.seconds, self._late)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        self._refuse(408, f"no request came within {self.seconds:g} seconds. Send it at once.")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing() or self._refused:
            return
        self._refused = True
        words = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}[status]
        body = json.dumps(error_document(Problem(status, message))).encode()
        head = f"HTTP/1.1 {status} {words}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        # Closed at once, what the client is still sending would make the system take the answer back.
        self.transport.write_eof()
        self.loop.call_later(_LINGER, self.transport.close)
