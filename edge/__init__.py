"""ruvltra-edge: routes developer tasks to agents and embeds text, locally and offline.

>>> from edge import Router
>>> Router.load().route("Fix the null pointer in the login handler").agent
'debugger'
"""

from typing import TYPE_CHECKING

import numpy  # noqa: F401 (before all else: the heap that it leaves lets the tokenizer load in half the time)

from edge.agents import Agent, load_agents
from edge.bundle import Bundle
from edge.encoder import Encoder
from edge.errors import (
    AgentError,
    BackendError,
    BundleError,
    ChecksumError,
    EdgeError,
    EdgeWarning,
    InputError,
    ManifestError,
    MissingExtra,
    OutputError,
    PlacementError,
    ProviderUnavailable,
    StoreError,
    VersionError,
)
from edge.providers import Provider
from edge.router import STRATEGIES, Decision, Ranked, Router
from edge.session import Placement

if TYPE_CHECKING:
    from edge.capabilities import Capabilities, Capability
    from edge.generate import Generator
    from edge.index import Hit, Index
    from edge.memory import MemoryStore

__version__ = "0.4.0"

__all__ = [
    "STRATEGIES",
    "Agent",
    "AgentError",
    "BackendError",
    "Bundle",
    "BundleError",
    "Capabilities",
    "Capability",
    "ChecksumError",
    "Decision",
    "EdgeError",
    "EdgeWarning",
    "Encoder",
    "Generator",
    "Hit",
    "Index",
    "InputError",
    "ManifestError",
    "MemoryStore",
    "MissingExtra",
    "OutputError",
    "Placement",
    "PlacementError",
    "Provider",
    "ProviderUnavailable",
    "Ranked",
    "Router",
    "StoreError",
    "VersionError",
    "load_agents",
]

_LAZY = {
    "Capabilities": "edge.capabilities",
    "Capability": "edge.capabilities",
    "Generator": "edge.generate",
    "Hit": "edge.index",
    "Index": "edge.index",
    "MemoryStore": "edge.memory",
}  # routing needs none of these, and starts sooner without


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
