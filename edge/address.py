"""Where a server listens, and who may come in."""

from __future__ import annotations

import argparse
import os
import re
import socket
from pathlib import Path

from edge.errors import InputError

TOKEN = "RUVLTRA_TOKEN"  # noqa: S105 (the name of an environment variable)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHORTEST = 16  # characters of a token


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Give a server's verb ``--host``, ``--port`` and ``--token-file``."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1; others need a token)"
    )
    parser.add_argument(
        "--port", type=port_number, default=port, metavar="N", help=f"default: {port}; 0 takes a free one"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help=f"what requests must bear (default: the variable {TOKEN}, if set)"
    )


def port_number(text: str) -> int:
    """A port, as an argument."""
    if not text.isdecimal() or int(text[:6]) > 65535:
        raise argparse.ArgumentTypeError("must be a number from 0 to 65535")
    return int(text)


def required_token(options: argparse.Namespace) -> str | None:
    """What requests must bear; None if nothing is set, which is enough for this machine alone.

    Raises:
        InputError: It cannot be read or is too short, or there is none and other machines can reach the address.
    """
    place, token = f"the variable {TOKEN}", os.environ.get(TOKEN)
    if options.token_file is not None:
        place = options.token_file
        try:
            token = Path(place).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{place}: cannot be read as a token ({error}). Check the file.") from None
    if token is not None and not re.fullmatch(f"[!-~]{{{_SHORTEST},}}", token):
        raise InputError(
            f"{place}: is no token. Use {_SHORTEST} or more letters, digits and signs, such as: openssl rand -hex 32"
        )
    if token is None and options.host not in LOOPBACK:
        raise InputError(
            f"{options.host} can be reached from other machines, and no token is set. Put one into the variable "
            f"{TOKEN} or give --token-file, or use the address 127.0.0.1."
        )
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        InputError: The address or port cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise InputError(f"cannot listen at {host}, port {port} ({error}). Choose another address or port.") from None


def shown(host: str, listening: socket.socket) -> str:
    """The address as part of a URL."""
    return f"{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
