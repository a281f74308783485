"""Connections: how long a request's head may take, how many there may be, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import http
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
_HEAD = 64 * 1024  # bytes of a request's head


def run(app: App, listening: socket.socket, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT; requests that were accepted are answered."""

    class Protocol(_Connection):
        head_seconds = limits.head_seconds
        answer_seconds = limits.body_seconds
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
    _Server(config, app, limits.grace_seconds, listening).run(sockets=[listening.dup()])


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
    """Refuses a connection too many, and closes one whose request does not come in or whose answer is not read."""

    head_seconds: float  # for a head to come in
    answer_seconds: float  # for some of an answer to be read
    most: int  # connections
    _head_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None
    _head = 0  # bytes of a head that is not complete
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # to be told of whatever the client does not take
        if len(self.connections) > self.most:
            self._refuse(503, "there are too many connections. Come again later.")
            return
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timing_head()
        self._stop_timing_answer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        head = self._head_timer
        super().data_received(data)
        self._head = self._head + len(data) if head is not None and head is self._head_timer else 0
        if self._head > _HEAD:
            self._stop_timing_head()
            self._refuse(431, f"the head of the request has more than {_HEAD} bytes. Send fewer headers.")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_answer(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_timing_answer()
        super().resume_writing()

    def _time_answer(self, size: int) -> None:
        """Give the client time to take some of what is written, and again if it does."""
        self._stop_timing_answer()
        self._answer_timer = self.loop.call_later(self.answer_seconds, self._answer_is_unread, size)

    def _answer_is_unread(self, size: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < size:
            self._time_answer(left)
        else:
            self.transport.abort()

    def _stop_timing_answer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def on_message_begin(self) -> None:
        if self._head_timer is None:
            self._time_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_timing_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's signature)
        self._stop_timing_head()
        self._refuse(400, "this is no HTTP request. Look at /docs.")

    def _time_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _stop_timing_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        self._refuse(408, f"no request came within {self.head_seconds:g} seconds. Send it at once.")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing() or self._refused:
            return
        self._refused = True
        words = http.HTTPStatus(status).phrase
        body = json.dumps(error_document(Problem(status, message))).encode()
        head = f"HTTP/1.1 {status} {words}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        # Closed at once, what the client is still sending would make the system take the answer back.
        self.transport.write_eof()
        self.loop.call_later(_LINGER, self.transport.close)
