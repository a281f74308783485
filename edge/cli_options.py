"""What several verbs of the command line read in the same way."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edge.bundle import Bundle
from edge.encoder import Encoder, clean
from edge.errors import InputError
from edge.providers import Provider
from edge.router import STRATEGIES, Router

if TYPE_CHECKING:
    from edge.memory import MemoryStore


def texts(arguments: Sequence[str]) -> Iterator[str]:
    """The texts of the command line; '-' stands for the lines of standard input."""
    for argument in arguments:
        if argument != "-":
            yield clean(argument)
            continue
        if sys.stdin is None:
            raise InputError("standard input is closed. Pipe texts into it, or give them as arguments.")
        for number, line in enumerate(sys.stdin.buffer):
            yield line.decode("utf-8" if number else "utf-8-sig", "replace").rstrip("\r\n")


def wanted(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``Router.load`` and ``Encoder.load`` that both have."""
    device = Provider(options.device, dict(options.option)) if options.option else options.device
    return {
        "variant": options.variant,
        "device": device,
        "threads": options.threads,
        "strict": options.strict,
        "use": options.use,
    }


class Parts(NamedTuple):
    """What a server is made of."""

    bundle: Bundle
    router: Router
    encoder: Encoder
    store: MemoryStore | None


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Give a server's verb ``--strategy`` and ``--memory``; ``--bundle`` and the like it shares with other verbs."""
    parser.add_argument("--strategy", choices=STRATEGIES, default="hybrid", help="how to decide (default: hybrid)")
    parser.add_argument("--memory", metavar="DIR", help="folder of a store; without it, nothing is remembered")


def load_parts(options: argparse.Namespace) -> Parts:
    """Load what a server's options say; its store has to be closed."""
    from edge.memory import MemoryStore

    bundle = Bundle.open(options.bundle)
    router = Router.load(bundle, agents=options.agents, strategy=options.strategy, **wanted(options))
    encoder = Encoder.load(bundle, **wanted(options)) if router.encoder is None else router.encoder
    store = None if options.memory is None else MemoryStore(options.memory, encoder=encoder)
    return Parts(bundle, router, encoder, store)


def count(text: str) -> int:
    """A whole number from 1, as an argument."""
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 10**7:
        raise argparse.ArgumentTypeError("must be a whole number from 1")
    return int(text)
