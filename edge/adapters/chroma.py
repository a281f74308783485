"""Chroma's embedding function: ``RuvltraEmbeddingFunction`` for its collections.

A collection that was kept opens with it by itself, once this module is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge.adapters import only_texts, same_encoder
from edge.bundle import Bundle
from edge.encoder import Encoder
from edge.errors import InputError, MissingExtra

try:
    from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
    from chromadb.utils.embedding_functions import register_embedding_function
except ModuleNotFoundError as error:
    raise MissingExtra("edge.adapters.chroma, for chromadb,", "adapters") from error


@register_embedding_function
class RuvltraEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embeds by a bundle, whose model is loaded by the first text: Chroma makes embedding functions to compare them.

    A collection keeps the bundle's path and its encoder's id. Opened again, it is refused if another encoder is there.

    Args:
        bundle: Folder or zip file; None for the bundle that comes with the package.
        encoder: One of that bundle that is loaded already.

    Raises:
        BundleError: The bundle cannot be used.
        InputError: The encoder is another bundle's.
    """

    def __init__(self, bundle: str | Path | None = None, *, encoder: Encoder | None = None) -> None:
        self._path = None if bundle is None else str(Path(bundle).absolute())
        self._bundle = Bundle.open(bundle)
        if encoder is not None:
            same_encoder(self._bundle, encoder.id, "the encoder given")
        self._encoder = encoder

    def __call__(self, input: Documents) -> Embeddings:
        """Unit vectors (dim,) float32, one a document."""
        if self._encoder is None:
            self._encoder = Encoder.load(self._bundle)
        return list(self._encoder.encode(only_texts(input)))

    @staticmethod
    def name() -> str:
        """What collections call it."""
        return "ruvltra"

    def default_space(self) -> Space:
        """Distances are by cosine."""
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        """All: the vectors are of unit length, so that each ranks alike."""
        return ["cosine", "l2", "ip"]

    def get_config(self) -> dict[str, Any]:
        """What a collection keeps of it."""
        return {"bundle": self._path, "encoder": self._bundle.encoder_id}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> RuvltraEmbeddingFunction:
        """The same again, from what a collection keeps.

        Raises:
            BundleError: The bundle cannot be used any more.
            InputError: It is another encoder's.
        """
        made = RuvltraEmbeddingFunction(config["bundle"])
        same_encoder(made._bundle, config["encoder"], "the collection")
        return made

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Let a collection's bundle move, but not change.

        Raises:
            InputError: Its encoder is another one.
        """
        if old_config["encoder"] != new_config["encoder"]:
            raise InputError("a collection's vectors are of another encoder. Make a new collection for this bundle.")
