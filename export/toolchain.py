"""The tested set of tools is what ``pyproject.toml`` pins for the extra ``export``; this checks it."""

from __future__ import annotations

import importlib.metadata
import re

from edge.errors import MissingExtra
from export.errors import ToolchainError

_EXTRA = "export"


def check_toolchain() -> None:
    """Hold what is installed against what was tested.

    Raises:
        MissingExtra: A tool is not installed.
        ToolchainError: One is of another version; the message names both.
    """
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("ruvltra-edge") or []:
        if not re.search(rf"extra\s*==\s*['\"]{_EXTRA}['\"]", line):
            continue
        requirement = Requirement(line.partition(";")[0])
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            raise MissingExtra("ruvltra-export", _EXTRA) from None
        if not requirement.specifier.contains(installed, prereleases=True):
            raise ToolchainError(
                f"{requirement.name} {installed} is installed, but the exporter was tested with "
                f"{requirement.name}{requirement.specifier}. Run: pip install 'ruvltra-edge[{_EXTRA}]'"
            )
