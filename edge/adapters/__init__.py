"""Bundles as other libraries' embedding models: one module a library, which needs that library alone.

=============================  ========================================================
``.sentence_transformers``     ``SentenceTransformer``, by its look; needs no library
``.langchain``                 ``RuvltraEmbeddings``, an ``Embeddings`` of langchain-core
``.llama_index``               ``RuvltraEmbedding``, a ``BaseEmbedding`` of llama-index-core
``.semantic_router``           ``RuvltraEncoder``, a ``DenseEncoder`` of semantic-router
``.chroma``                    ``RuvltraEmbeddingFunction``, an ``EmbeddingFunction`` of chromadb
=============================  ========================================================

Each is made with ``bundle`` (a path; None for the default bundle) and, where variant, device or threads are to be
chosen, with ``encoder``, an :class:`edge.Encoder` of that bundle that is loaded already.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edge.bundle import Bundle
from edge.encoder import Encoder
from edge.errors import InputError


def open_model(bundle: str | Path | None, encoder: Encoder | None) -> tuple[Bundle, Encoder]:
    """A bundle and its encoder, which is loaded unless it is given.

    Raises:
        BundleError: The bundle cannot be used.
        InputError: The encoder is another bundle's.
    """
    opened = Bundle.open(bundle)
    if encoder is None:
        return opened, Encoder.load(opened)
    same_encoder(opened, encoder.id, "the encoder given")
    return opened, encoder


def same_encoder(bundle: Bundle, identity: str, whose: str) -> None:
    """Refuse a bundle whose vectors cannot be compared with those of the encoder of an id.

    Raises:
        InputError: The ids differ.
    """
    if bundle.encoder_id != identity:
        raise InputError(
            f"{bundle.path}: its encoder is not that of {whose}. Give the path of the bundle which that one is from."
        )


def vectors(encoder: Encoder, texts: Iterable[str]) -> list[list[float]]:
    """Unit vectors of texts as lists, which most libraries want.

    Raises:
        InputError: Something that is not a text.
    """
    rows: list[list[float]] = encoder.encode(only_texts(texts)).tolist()
    return rows


def only_texts(items: Iterable[object]) -> list[str]:
    """The items, if all are texts: several libraries hand over pictures and mappings as well.

    Raises:
        InputError: One of them is not.
    """
    texts = []
    for item in items:
        if not isinstance(item, str):
            raise InputError(f"only texts can be embedded, not {type(item).__name__}. Give a string for each.")
        texts.append(item)
    return texts
