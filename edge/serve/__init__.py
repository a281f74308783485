"""The verb ``ruvltra serve``: a bundle over HTTP. What it takes, and how it starts and ends."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from edge.address import add_address, listen, required_token, shown
from edge.cli_options import add_parts, count, load_parts
from edge.errors import MissingExtra


@dataclass(frozen=True)
class Limits:
    """What a request, and all of them together, may take.

    Attributes:
        body: Bytes of a body.
        items: Texts of a request.
        characters: Of a text.
        requests: That are worked on or wait; more are answered by 503.
        connections: That are open; more are answered by 503 and closed.
        head_seconds: For a request's head to come in.
        body_seconds: For its body, and for some of the answer to be read.
        grace_seconds: Between the signal to end and the end of listening.
        batch: Texts that are run together.
        wait_seconds: That a text waits for company.
    """

    body: int = 8 * 1024 * 1024
    items: int = 2048
    characters: int = 100_000
    requests: int = 256
    connections: int = 1024
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    grace_seconds: float = 0.5
    batch: int = 64
    wait_seconds: float = 0.0


def fill(parser: argparse.ArgumentParser) -> None:
    """Give ``ruvltra serve`` its arguments."""
    usual = Limits()
    parser.description = (
        "Serve a bundle over HTTP: embeddings as OpenAI's API has them, routing, memory, metrics; docs at /docs. "
        "This machine alone can reach it, unless another --host and a token are given."
    )
    add_parts(parser)
    add_address(parser, 8080)
    for name, value, what in (
        ("max-body", usual.body, "bytes of a request"),
        ("max-items", usual.items, "texts of a request"),
        ("max-characters", usual.characters, "characters of a text"),
        ("max-requests", usual.requests, "requests at a time; more are answered by 503"),
        ("max-connections", usual.connections, "open connections"),
        ("max-batch", usual.batch, "texts that are run together; 1 runs one after the other"),
    ):
        parser.add_argument(f"--{name}", type=count, default=value, metavar="N", help=f"{what} (default: {value})")
    for name, seconds, what in (
        ("head-timeout", usual.head_seconds, "for a request's head to come in"),
        ("body-timeout", usual.body_seconds, "for its body"),
        ("grace", usual.grace_seconds, "between SIGTERM and the end of listening"),
        ("max-wait", usual.wait_seconds, "that a text waits for company"),
    ):
        parser.add_argument(
            f"--{name}", type=_seconds, default=seconds, metavar="S", help=f"seconds {what} (default: {seconds:g})"
        )
    parser.add_argument("--no-log", action="store_true", help="no line on standard error for each request")
    parser.set_defaults(run=_run)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError("must be a number of seconds from 0 to 3600")
    return value


def _run(options: argparse.Namespace) -> int:
    token = required_token(options)
    try:
        from edge.serve.app import App
        from edge.serve.connection import run
    except ImportError:
        raise MissingExtra("ruvltra serve", "serve") from None

    limits = Limits(
        body=options.max_body,
        items=options.max_items,
        characters=options.max_characters,
        requests=options.max_requests,
        connections=options.max_connections,
        head_seconds=options.head_timeout,
        body_seconds=options.body_timeout,
        grace_seconds=options.grace,
        batch=options.max_batch,
        wait_seconds=options.max_wait,
    )
    bundle, router, encoder, store = load_parts(options)
    try:
        with listen(options.host, options.port) as listening:
            app = App(bundle, router, encoder, store, token, options.host, limits, log=not options.no_log)
            print(f"ruvltra: http://{shown(options.host, listening)}", file=sys.stderr, flush=True)
            run(app, listening, limits)
    finally:
        if store is not None:
            store.close()
    return 0
