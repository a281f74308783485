"""Errors of the authoring side, under the same root as the runtime's."""

from __future__ import annotations

from edge.errors import EdgeError


class CheckpointError(EdgeError):
    """A checkpoint folder is incomplete, inconsistent or of a kind that is not supported."""


class RecipeError(EdgeError):
    """A recipe or its training data cannot be used; the message names the file."""


class ToolchainError(EdgeError):
    """A tool of the export chain did not do what it was asked to, or is of an untested version."""


class ParityError(EdgeError):
    """An exported variant does not match the original closely enough; ``report`` says where."""

    def __init__(self, message: str, report: str) -> None:
        super().__init__(message)
        self.report = report
