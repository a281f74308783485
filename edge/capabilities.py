"""Which tool of a catalogue does what a request asks for: those of claude-flow, agentic-flow and ruvector.

An entry's logit is the sum of two parts, both prepared by ``ruvltra-export capabilities``. *Meaning*: linear
discriminants of the request's vector (Fisher 1936; one covariance for all entries, shrunken). *Words*: BM25 (Robertson
and Zaragoza 2009) over the words and their pieces of four letters, which also find other forms and misspellings. A
softmax over all entries gives the scores.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.bundle import Bundle
from edge.encoder import Encoder, clean
from edge.errors import BundleError, InputError, ManifestError
from edge.index import whole

BUCKETS = 2**16  # of terms, by their hash; a catalogue has some 15,000 terms
PIECE = 4  # letters
_EXPORT_AGAIN = "Copy the bundle again, or make the catalogue again: ruvltra-export capabilities"


class Capability(NamedTuple):
    """An entry of the catalogue, as an answer to a request.

    Attributes:
        id: ``ecosystem/kind/name``; the name of a sub-command is that of its command, a blank, and its own.
        score: How probable it is that this is the one, if the request is for any of them.
        description: What it does.
        also: What it is in other ecosystems, where it exists in several.
    """

    id: str
    score: float
    description: str
    also: tuple[str, ...]


class Entry(NamedTuple):
    """A capability that is the same in one or several ecosystems: ids, and what it does."""

    ids: tuple[str, ...]
    description: str


class Scorer(NamedTuple):
    """What turns a request into a logit for each of n entries.

    Attributes:
        dense: (n, dim) float32.
        bias: (n,) float32.
        starts: (BUCKETS + 1,) int32: where each bucket of terms begins in the next two.
        places: (postings,) uint16: entries.
        impacts: (postings,) float32: what the term adds to the entry.
    """

    dense: NDArray[np.float32]
    bias: NDArray[np.float32]
    starts: NDArray[np.int32]
    places: NDArray[np.uint16]
    impacts: NDArray[np.float32]

    def logits(self, request: str, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,) float32 of one request and its (dim,) vector."""
        found = [slice(self.starts[term], self.starts[term + 1]) for term in set(terms(request))]
        postings = np.concatenate([np.arange(part.start, part.stop) for part in found]) if found else np.arange(0)
        words = np.bincount(self.places[postings], self.impacts[postings], len(self.bias))
        logits: NDArray[np.float32] = (self.dense @ vector + self.bias + words).astype(np.float32)
        return logits


class Capabilities:
    """A bundle's catalogue. Thread-safe.

    Attributes:
        entries: All of them.
        ecosystems: Whose they are, in the catalogue's order.
    """

    def __init__(self, entries: tuple[Entry, ...], scorer: Scorer, encoder: Encoder) -> None:
        """Put the parts together; use :meth:`load`."""
        self.entries = entries
        self.ecosystems = tuple(dict.fromkeys(ecosystem(name) for entry in entries for name in entry.ids))
        self._has = {
            name: np.array([any(ecosystem(other) == name for other in entry.ids) for entry in entries])
            for name in self.ecosystems
        }
        self._scorer = scorer
        self._encoder = encoder

    def __len__(self) -> int:
        return sum(len(entry.ids) for entry in self.entries)

    @classmethod
    def load(cls, bundle: str | Path | Bundle | None = None, *, encoder: Encoder | None = None) -> Capabilities:
        """Open the catalogue of a bundle.

        Args:
            bundle: Folder, zip file or opened bundle; None for the one that comes with the package.
            encoder: The bundle's, if it is loaded already; its variant does not matter.

        Raises:
            BundleError: The bundle cannot be used, or has no catalogue.
            BackendError: Its model cannot run here.
            InputError: The encoder is another bundle's.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if opened.catalogue is None:
            raise BundleError(
                f"{opened.path}: has no catalogue of capabilities. Use the built-in bundle, or add one: ruvltra-export "
                "capabilities"
            )
        if encoder is not None and encoder.id != opened.encoder_id:
            raise InputError(f"the encoder is not that of {opened.path}. Load it from the same bundle.")
        entries = tuple(Entry(tuple(ids), description) for ids, description in opened.capabilities())
        data = opened.read(opened.catalogue.scorer)
        scorer = _scorer(data, len(entries), opened.encoder.dim, str(opened.path / opened.catalogue.scorer.file))
        return cls(entries, scorer, Encoder.load(opened) if encoder is None else encoder)

    def search(self, request: str, k: int = 5, *, ecosystem: str | None = None) -> list[Capability]:
        """The capabilities that are most probably asked for, most probable first.

        Args:
            request: What is to be done, in words; none are found for a blank one.
            k: How many at most; what is the same in several ecosystems counts once.
            ecosystem: Only what this one has.

        Raises:
            InputError: k is below 1, or there is no such ecosystem.
        """
        k = whole(k, "k")
        if not isinstance(request, str):
            raise InputError(f"a request must be a text, not {type(request).__name__}. Search for one at a time.")
        if ecosystem is not None and ecosystem not in self.ecosystems:
            raise InputError(f"there is no ecosystem {ecosystem!r}. Choose one of: {', '.join(self.ecosystems)}.")
        if not request.strip():
            return []
        logits = self._scorer.logits(request, self._encoder.encode([request])[0])
        if ecosystem is not None:
            logits[~self._has[ecosystem]] = -np.inf
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        found = []
        for i in np.argsort(-logits, kind="stable")[:k].tolist():
            if np.isfinite(logits[i]):
                first, *others = _arranged(self.entries[i].ids, ecosystem)
                found.append(Capability(first, float(scores[i]), self.entries[i].description, tuple(others)))
        return found


def ecosystem(name: str) -> str:
    """The first part of an id."""
    return name.partition("/")[0]


def terms(text: str) -> list[int]:
    """The buckets of a text's words and of their pieces, repeated as they are in the text."""
    found = []
    for word in re.findall(r"[^\W_]+", clean(text).lower()):
        framed = f"<{word}>"
        found.append(word)
        found += [framed[i : i + PIECE] for i in range(len(framed) - PIECE + 1)]
    return [zlib.crc32(term.encode()) % BUCKETS for term in found]


def _arranged(ids: tuple[str, ...], first: str | None) -> list[str]:
    """The ids, that of an ecosystem first."""
    return sorted(ids, key=lambda name: first is not None and ecosystem(name) != first)


def pack(scorer: Scorer) -> bytes:
    """A scorer as a file: dense values and impacts in half precision."""
    stream = io.BytesIO()
    halves = {"dense": scorer.dense.astype(np.float16), "impacts": scorer.impacts.astype(np.float16)}
    np.savez_compressed(stream, allow_pickle=False, **(scorer._asdict() | halves))
    return stream.getvalue()


def _scorer(data: bytes, count: int, dim: int, where: str) -> Scorer:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            scorer = Scorer(**{name: archive[name] for name in Scorer._fields})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ManifestError(f"{where}: cannot be read ({error}). {_EXPORT_AGAIN}") from None
    postings = scorer.places.size
    expected = {
        "dense": ("float16", (count, dim)),
        "bias": ("float32", (count,)),
        "starts": ("int32", (BUCKETS + 1,)),
        "places": ("uint16", (postings,)),
        "impacts": ("float16", (postings,)),
    }
    fits = (
        {name: (part.dtype.name, part.shape) for name, part in scorer._asdict().items()} == expected
        and scorer.starts[0] == 0
        and scorer.starts[-1] == postings
        and bool((np.diff(scorer.starts) >= 0).all())
        and bool((scorer.places < count).all())
        and all(bool(np.isfinite(part).all()) for part in (scorer.dense, scorer.bias, scorer.impacts))
    )
    if not fits:
        raise ManifestError(f"{where}: does not fit its catalogue. {_EXPORT_AGAIN}")
    return scorer._replace(dense=scorer.dense.astype(np.float32), impacts=scorer.impacts.astype(np.float32))
