"""LangChain's embedding model: ``RuvltraEmbeddings`` for its vector stores, retrievers and caches."""

from __future__ import annotations

from pathlib import Path

from edge.adapters import open_model, vectors
from edge.encoder import Encoder
from edge.errors import MissingExtra

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as error:
    raise MissingExtra("edge.adapters.langchain, for langchain-core,", "adapters") from error


class RuvltraEmbeddings(Embeddings):
    """Embeds by a bundle. Queries and documents alike; the ``a...`` methods run in LangChain's threads.

    Args:
        bundle: Folder or zip file; None for the bundle that comes with the package.
        encoder: One of that bundle that is loaded already.

    Raises:
        BundleError: The bundle cannot be used.
        BackendError: Its model cannot run here.
        InputError: The encoder is another bundle's.
    """

    def __init__(self, bundle: str | Path | None = None, *, encoder: Encoder | None = None) -> None:
        _, self._encoder = open_model(bundle, encoder)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Unit vectors, one a text."""
        return vectors(self._encoder, texts)

    def embed_query(self, text: str) -> list[float]:
        """Unit vector of one text."""
        return vectors(self._encoder, [text])[0]
