"""LlamaIndex's embedding model: ``RuvltraEmbedding`` for its indexes, retrievers and pipelines."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from edge.adapters import open_model, same_encoder, vectors
from edge.encoder import Encoder
from edge.errors import MissingExtra

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
except ModuleNotFoundError as error:
    raise MissingExtra("edge.adapters.llama_index, for llama-index-core,", "adapters") from error


class RuvltraEmbedding(BaseEmbedding):
    """Embeds by a bundle. Queries and documents alike; the asynchronous methods run in threads.

    It is written as the bundle's path and its encoder's id, and read back by them: the model is loaded anew, and
    another one in that place is refused.

    Attributes:
        bundle: Folder or zip file; None for the bundle that comes with the package.
        encoder: One of that bundle that is loaded already; not written.
        encoder_id: What the encoder computes (:attr:`edge.Encoder.id`). Set by itself.

    Raises:
        BundleError: The bundle cannot be used.
        BackendError: Its model cannot run here.
        InputError: The encoder, or the one of that id, is another bundle's.
    """

    bundle: str | None = None
    encoder: Encoder | None = Field(default=None, exclude=True, repr=False)
    encoder_id: str = ""
    _encoder: Encoder = PrivateAttr()

    @classmethod
    def class_name(cls) -> str:
        """The name that serialised components have."""
        return "RuvltraEmbedding"

    def model_post_init(self, context: Any) -> None:
        """Load the model, once the fields are there."""
        super().model_post_init(context)
        opened, self._encoder = open_model(self.bundle, self.encoder)
        if self.encoder_id:
            same_encoder(opened, self.encoder_id, "the model that was written")
        self.encoder, self.encoder_id, self.model_name = None, opened.encoder_id, opened.name
        self.bundle = None if self.bundle is None else str(Path(self.bundle).absolute())

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return vectors(self._encoder, texts)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await self._aget_text_embedding(query)
