"""ruvltra-edge: routes developer tasks to agents and embeds text, locally and offline.

>>> from edge import Router
>>> Router.load().route("Fix the null pointer in the login handler").agent
'debugger'
"""

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
    VersionError,
)
from edge.providers import Provider
from edge.router import STRATEGIES, Decision, Ranked, Router
from edge.session import Placement

__version__ = "0.4.0"

__all__ = [
    "STRATEGIES",
    "Agent",
    "AgentError",
    "BackendError",
    "Bundle",
    "BundleError",
    "ChecksumError",
    "Decision",
    "EdgeError",
    "EdgeWarning",
    "Encoder",
    "InputError",
    "ManifestError",
    "MissingExtra",
    "OutputError",
    "Placement",
    "PlacementError",
    "Provider",
    "ProviderUnavailable",
    "Ranked",
    "Router",
    "VersionError",
    "load_agents",
]
