"""What several verbs of the command line read in the same way."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from edge.encoder import clean
from edge.errors import InputError
from edge.providers import Provider


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


def count(text: str) -> int:
    """A whole number from 1, as an argument."""
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 10**7:
        raise argparse.ArgumentTypeError("must be a whole number from 1")
    return int(text)
