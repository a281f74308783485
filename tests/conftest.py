"""What all tests share: the shipped bundle, its router, and no network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from edge import Bundle, Router
from edge.device import CACHE

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "models" / "ruvltra-mini"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is a failure: neither routing nor exporting may need one."""

    def refuse(*_: object) -> None:
        raise AssertionError("a test tried to open a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that was measured on this machine before counts, and nothing is left behind."""
    monkeypatch.setenv(CACHE, str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return Bundle.open(MINI / "bundle")


@pytest.fixture(scope="session")
def router(bundle: Bundle) -> Router:
    return Router.load(bundle)
