"""semantic-router's encoder: ``RuvltraEncoder`` for its routers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from edge.adapters import open_model, vectors
from edge.encoder import Encoder
from edge.errors import MissingExtra

try:
    from pydantic import PrivateAttr
    from semantic_router.encoders import DenseEncoder
except ModuleNotFoundError as error:
    raise MissingExtra("edge.adapters.semantic_router, for semantic-router,", "adapters") from error


class RuvltraEncoder(DenseEncoder):
    """Embeds by a bundle. Texts only.

    Args:
        bundle: Folder or zip file; None for the bundle that comes with the package.
        encoder: One of that bundle that is loaded already.

    Raises:
        BundleError: The bundle cannot be used.
        BackendError: Its model cannot run here.
        InputError: The encoder is another bundle's.
    """

    _encoder: Encoder = PrivateAttr()

    def __init__(self, bundle: str | Path | None = None, *, encoder: Encoder | None = None) -> None:
        opened, loaded = open_model(bundle, encoder)
        super().__init__(name=opened.name, type="ruvltra")
        self._encoder = loaded

    def __call__(self, docs: list[Any]) -> list[list[float]]:
        """Unit vectors, one a text.

        Raises:
            InputError: Something that is not a text.
        """
        return vectors(self._encoder, docs)

    async def acall(self, docs: list[Any]) -> list[list[float]]:
        """The same, in a thread."""
        return await asyncio.to_thread(self, docs)
