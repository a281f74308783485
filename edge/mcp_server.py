"""The verb ``ruvltra mcp``: what it takes, how it starts and ends; what it offers is in :mod:`edge.mcp_tools`."""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial

from edge.address import add_address, listen, required_token, shown
from edge.cli_options import add_parts, load_parts
from edge.errors import InputError, MissingExtra


def fill(parser: argparse.ArgumentParser) -> None:
    """Give ``ruvltra mcp`` its arguments."""
    parser.description = (
        "Serve tools to language models by the Model Context Protocol: route tasks to agents, embed texts, remember "
        "and find texts, find capabilities. docs/mcp.md says how to add it to Claude Code and other clients."
    )
    add_parts(parser)
    parser.add_argument(
        "--transport",
        choices=("stdio", "http"),
        default="stdio",
        help="standard input and output, or streamable HTTP at /mcp (default: stdio)",
    )
    add_address(parser, 8000)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # As Ctrl+C does: what is being done is finished, and no traceback shown.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return _serve(options)
    except KeyboardInterrupt:
        return 0


def _serve(options: argparse.Namespace) -> int:
    http = options.transport == "http"
    token = required_token(options) if http else None
    if not http and (sys.stdin is None or sys.stdout is None):
        raise InputError("standard input or output is closed. Let an MCP client start this, or use --transport http.")
    try:
        import anyio

        from edge.mcp_tools import Tools, build, serve_http, serve_stdio
    except ImportError:
        raise MissingExtra("ruvltra mcp", "mcp") from None
    from edge.capabilities import Capabilities

    # All of it before the first message: it takes a tenth of the start, and what is wrong is said at once.
    bundle, router, encoder, store = load_parts(options)
    try:
        catalogue = None if bundle.catalogue is None else Capabilities.load(bundle, encoder=encoder)
        server = build(Tools(router, encoder, catalogue, store))
        if http:
            with listen(options.host, options.port) as listening:
                print(f"ruvltra: http://{shown(options.host, listening)}/mcp", file=sys.stderr, flush=True)
                anyio.run(partial(serve_http, server, listening, options.host, token))
        else:
            anyio.run(serve_stdio, server)
    finally:
        if store is not None:
            store.close()
    return 0
