"""The verb ``ruvltra serve``: a bundle over HTTP. What it takes, and how it starts and ends."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from edge.address import add_address, listen, required_token, shown
from edge.bundle import Bundle
from edge.cli_options import count, wanted
from edge.encoder import Encoder
from edge.errors import MissingExtra
from edge.router import STRATEGIES, Router


@dataclass(frozen=True)
class Limits:
    """What a request, and all of them together, may take.

    Attributes:
        body: Bytes of a body.
        items: Texts of a request.
        characters: Of a text.
        requests: That are worked on or wait; more are answered by 503.
        connections: That are open; more are answered by 503 and closed.
        head: Seconds for a request's head to come in.
        seconds: For its body.
        grace: Between the signal to end and the end of listening.
        batch: Texts that are run together.
        wait: Seconds that a text waits for company.
    """

    body: int = 8 * 1024 * 1024
    items: int = 2048
    characters: int = 100_000
    requests: int = 256
    connections: int = 1024
    head: float = 10.0
    seconds: float = 30.0
    grace: float = 0.5
    batch: int = 64
    wait: float = 0.0


def fill(parser: argparse.ArgumentParser) -> None:
    """Give ``ruvltra serve`` its arguments."""
    usual = Limits()
    parser.description = (
        "Serve a bundle over HTTP: embeddings as OpenAI's API has them, routing, memory, metrics; docs at /docs. "
        "This machine alone can reach it, unless another --host and a token are given."
    )
    parser.add_argument("--strategy", choices=STRATEGIES, default="hybrid", help="how to decide (default: hybrid)")
    parser.add_argument("--memory", metavar="DIR", help="folder of a store; without it, there is no /v1/memory")
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
        ("head-timeout", usual.head, "for a request's head to come in"),
        ("body-timeout", usual.seconds, "for its body"),
        ("grace", usual.grace, "between SIGTERM and the end of listening"),
        ("max-wait", usual.wait, "that a text waits for company"),
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
    from edge.memory import MemoryStore

    limits = Limits(
        body=options.max_body,
        items=options.max_items,
        characters=options.max_characters,
        requests=options.max_requests,
        connections=options.max_connections,
        head=options.head_timeout,
        seconds=options.body_timeout,
        grace=options.grace,
        batch=options.max_batch,
        wait=options.max_wait,
    )
    bundle = Bundle.open(options.bundle)
    router = Router.load(bundle, agents=options.agents, strategy=options.strategy, **wanted(options))
    encoder = Encoder.load(bundle, **wanted(options)) if router.encoder is None else router.encoder
    store = None if options.memory is None else MemoryStore(options.memory, encoder=encoder)
    try:
        with listen(options.host, options.port) as listening:
            app = App(bundle, router, encoder, store, token, options.host, limits, log=not options.no_log)
            print(f"ruvltra: http://{shown(options.host, listening)}", file=sys.stderr, flush=True)
            run(app, listening, limits)
    finally:
        if store is not None:
            store.close()
    return 0
