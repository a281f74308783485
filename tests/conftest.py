"""What all tests share: the shipped bundle, its router, and no network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from edge import Bundle, Router

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "models" / "ruvltra-mini"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is a failure: neither routing nor exporting may need one."""

    def refuse(*_: object) -> None:
        raise AssertionError("a test tried to open a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return Bundle.open(MINI / "bundle")


@pytest.fixture(scope="session")
def router(bundle: Bundle) -> Router:
    return Router.load(bundle)
