"""What all tests share: the shipped bundle, its router, and no network."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: a process a core, of one thread
    os.environ["OMP_NUM_THREADS"] = "1"

from edge import Bundle, Router
from edge.device import CACHE

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "models" / "ruvltra-mini"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One a core, but no more than memory is sure to hold: each may export a bundle."""
    return min(4, os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """Files run in their order: the longest, those of the export, before the many short ones."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


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
