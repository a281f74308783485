"""The doors through which other programs come in: real servers and real clients, on loopback."""

from __future__ import annotations

import socket

import pytest

_connect = socket.socket.connect


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection that leaves this machine is a failure."""

    def loopback_only(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and (not isinstance(address, tuple) or address[0] not in ("127.0.0.1", "::1")):
            raise AssertionError(f"a test tried to open a network connection to {address}")
        _connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", loopback_only)
