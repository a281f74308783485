"""Looks like sentence-transformers, and needs neither it nor torch: change the import, give a bundle's path."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge.adapters import only_texts, open_model
from edge.encoder import Encoder
from edge.errors import InputError


class SentenceTransformer:
    """A bundle's encoder with the methods that most programs call on a ``SentenceTransformer``.

    Args:
        bundle: Folder or zip file; None for the bundle that comes with the package.
        encoder: One of that bundle that is loaded already.

    Attributes:
        max_seq_length: Tokens of the longest text; longer ones are cut.

    Raises:
        BundleError: The bundle cannot be used.
        BackendError: Its model cannot run here.
        InputError: The encoder is another bundle's.
    """

    def __init__(self, bundle: str | Path | None = None, *, encoder: Encoder | None = None) -> None:
        _, self._encoder = open_model(bundle, encoder)
        self.max_seq_length = self._encoder.max_length

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
    ) -> NDArray[np.float32]:
        """Embed one text, or several.

        Args:
            sentences: A text or a collection of texts.
            batch_size: Texts between two steps of the progress bar. Vectors do not depend on it: each text runs by
                itself.
            show_progress_bar: Count on standard error.
            precision: ``float32`` alone.
            convert_to_numpy: True alone.
            convert_to_tensor: False alone; for a tensor, hand the array to ``torch.from_numpy``.
            normalize_embeddings: Either: vectors have unit length in any case.

        Returns:
            (dim,) float32 for a text, (n, dim) for a collection.

        Raises:
            InputError: Something that is not a text, or a parameter that cannot be followed.
        """
        del normalize_embeddings
        if convert_to_tensor or not convert_to_numpy:
            raise InputError("tensors are not made, since there is no torch here. Use torch.from_numpy on the array.")
        if precision != "float32":
            raise InputError(f"precision {precision!r} is not made. Leave it at 'float32', and quantise the array.")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}. Give a whole number from 1.")
        if isinstance(sentences, str):
            vector: NDArray[np.float32] = self._encoder.encode([sentences])[0]
            return vector
        texts = only_texts(sentences)
        if not show_progress_bar:
            return self._encoder.encode(texts)
        rows = []
        for start in range(0, len(texts), batch_size):
            rows.append(self._encoder.encode(texts[start : start + batch_size]))
            done = min(start + batch_size, len(texts))
            print(f"\rembedded {done}/{len(texts)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return np.concatenate(rows) if rows else self._encoder.encode([])

    # A bundle has one prompt at most, which every text gets.
    encode_query = encode_document = encode

    def similarity(self, embeddings1: ArrayLike, embeddings2: ArrayLike) -> NDArray[np.float32]:
        """(n, m) float32 cosines of each of n vectors with each of m; one vector counts as a row."""
        first, second = (_unit(rows) for rows in (embeddings1, embeddings2))
        return first @ second.T

    def get_embedding_dimension(self) -> int:
        """Number of values of a vector."""
        return self._encoder.dim

    # Its name until sentence-transformers gave it the shorter one.
    get_sentence_embedding_dimension = get_embedding_dimension


def _unit(vectors: ArrayLike) -> NDArray[np.float32]:
    rows = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    unit: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit
