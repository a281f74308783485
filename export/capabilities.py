"""Makes a catalogue of capabilities searchable, and part of a bundle.

:mod:`edge.capabilities` says how a request is scored. Here the two parts are fitted on the catalogue's descriptions and
example requests, and the weights of the parts by cross-validation over the requests.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.bundle import MANIFEST, Bundle
from edge.capabilities import BUCKETS, Capabilities, Scorer, pack, terms
from edge.encoder import Encoder
from edge.errors import InputError
from edge.evaluate import Proportion
from export.bundle import listed, put_in_place, write_json, write_manifest
from export.calibrate import fit
from export.dataset import read_jsonl

ENTRIES = "capabilities.json"
SCORER = "capabilities.npz"
_MOST = 2**16  # entries that the scorer's places can name
_FOLDS = 5
_SHRINK = 0.3  # of the mean variance, added to each: fewer texts than would fill the covariance
_TINY = 1e-9  # added to each variance, for a catalogue of equal texts
_NAME_WEIGHT = 3  # of an entry's name among its words, to one of a description or request
_K1, _B = 1.2, 0.75  # of BM25; its usual values


class Described(NamedTuple):
    """A row of a catalogue.

    Attributes:
        ids: ``ecosystem/kind/name``, of each ecosystem that has it.
        description: What it does.
        keywords: Words for it.
        requests: What one would type to find it.
    """

    ids: tuple[str, ...]
    description: str
    keywords: tuple[str, ...]
    requests: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name and kind, as words."""
        _, kind, name = self.ids[0].split("/", 2)
        return f"{name} {kind}".replace("-", " ").replace("_", " ")


class Found(NamedTuple):
    """Of requests that were held back: how many the right entry was first for, and among the first five."""

    first: Proportion
    first_five: Proportion

    @classmethod
    def of(cls, logits: NDArray[np.floating], label: NDArray[np.int64]) -> Found:
        """Ranks by (n, entries) logits, against (n,) right entries."""
        right = np.take_along_axis(logits, label[:, None], axis=1)
        rank = (logits >= right).sum(axis=1) - 1  # a tie is no find
        return cls(*(Proportion.of(int((rank < k).sum()), len(label)) for k in (1, 5)))


def read_catalogue(path: Path) -> list[Described]:
    """Read a JSON-lines file of ``{"ids", "description", "keywords", "requests"}``.

    Raises:
        InputError: A row is not what it should be, or an id occurs twice; names file and line.
    """
    rows: list[Described] = []
    seen: dict[str, int] = {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        lists = {}
        for key in ("ids", "keywords", "requests"):
            values = row.get(key, [])
            if not isinstance(values, list) or not all(isinstance(text, str) and text.strip() for text in values):
                raise InputError(f"{where}: {key!r} must be a list of texts. Correct the row.")
            lists[key] = tuple(values)
        if not lists["ids"] or not all(
            len(name.split("/", 2)) == 3 and all(name.split("/", 2)) for name in lists["ids"]
        ):
            raise InputError(f"{where}: 'ids' must be ecosystem/kind/name, at least one. Correct the row.")
        description = row.get("description")
        if not isinstance(description, str) or not description.strip():
            raise InputError(f"{where}: 'description' must be a text. Say what it does.")
        if len(lists["requests"]) < 2:
            raise InputError(f"{where}: has fewer than two requests. Add what one would type to find it.")
        for name in lists["ids"]:
            if name in seen:
                raise InputError(f"{where}: {name} is in line {seen[name]}, too. Leave one of them out.")
            seen[name] = number
        rows.append(Described(lists["ids"], description, lists["keywords"], lists["requests"]))
    if not 2 <= len(rows) < _MOST:
        raise InputError(f"{path}: has {len(rows)} entries. Give 2 to {_MOST - 1}.")
    return rows


def fit_scorer(rows: Sequence[Described], encoder: Encoder) -> tuple[Scorer, Found]:
    """Fit a catalogue's scorer, and measure it by cross-validation.

    Each fifth of every entry's requests is held back once, and scored by what the rest give; the weights of the two
    parts are the most probable ones for these scores.

    Args:
        rows: The catalogue.
        encoder: Of the bundle that it is for.

    Returns:
        The scorer of all requests, and how it does on the held-back ones (which are unlike the others by intention,
        so that requests by other people tend to do better).
    """
    texts = [text for row in rows for text in (row.title, row.description, *row.requests)]
    vector_of = dict(zip(texts, encoder.encode(texts), strict=True))
    meaning: list[NDArray[np.float32]] = []
    words: list[NDArray[np.float32]] = []
    label: list[int] = []
    for fold in range(_FOLDS):
        kept = [row._replace(requests=_other_than(row.requests, fold)) for row in rows]
        held = [(i, text) for i, row in enumerate(rows) for text in row.requests[fold::_FOLDS]]
        if not held:  # no entry has so many requests
            continue
        vectors = np.stack([vector_of[text] for _, text in held])
        dense, bias = _discriminants(kept, vector_of)
        index = Scorer(np.zeros_like(dense), np.zeros_like(bias), *postings(kept))
        meaning.append(vectors @ dense.T + bias)
        words.append(np.stack([index.logits(text, vectors[0]) for _, text in held]))
        label += [i for i, _ in held]
    parts = np.stack([np.concatenate(meaning), np.concatenate(words)], axis=-1)
    right = np.array(label)
    spread = parts.std(axis=(0, 1)) + _TINY  # Newton's steps are for features of about this size
    weights = (fit(parts / spread, right, [0, 1]) / spread).astype(np.float32)
    dense, bias = _discriminants(rows, vector_of)
    starts, places, impacts = postings(rows)
    scorer = Scorer(dense * weights[0], bias * weights[0], starts, places, impacts * weights[1])
    return scorer, Found.of(parts @ weights, right)


def add_catalogue(path: Path, folder: Path) -> Found:
    """Make a catalogue part of a bundle, in the place of the one that it may have.

    The new bundle is put together beside the old one, opened and searched, and takes its place by a rename.

    Args:
        path: The catalogue.
        folder: The bundle.

    Returns:
        As :func:`fit_scorer`.

    Raises:
        InputError: The catalogue is not what it should be, or the bundle is no folder.
        BundleError: The bundle cannot be used.
    """
    rows = read_catalogue(path)
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 ("." needs a name, and resolve() would follow a link)
    if not folder.is_dir() or folder.is_symlink():
        raise InputError(f"{folder}: is no bundle folder. Unpack the bundle, or give the folder itself.")
    bundle = Bundle.open(folder)
    scorer, found = fit_scorer(rows, Encoder.load(bundle, variant=bundle.default_variant, device="cpu"))
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        shutil.copytree(folder, work, dirs_exist_ok=True, symlinks=True)
        write_json(work / ENTRIES, {"entries": [{"ids": row.ids, "description": row.description} for row in rows]})
        (work / SCORER).write_bytes(pack(scorer))
        manifest = json.loads((work / MANIFEST).read_bytes())
        manifest["capabilities"] = {"entries": listed(work, ENTRIES), "scorer": listed(work, SCORER)}
        write_manifest(work, manifest)
        catalogue = Capabilities.load(work)
        assert catalogue.search(rows[0].description, k=1)
        work.chmod(0o755)
        put_in_place(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def _other_than(requests: tuple[str, ...], fold: int) -> tuple[str, ...]:
    return tuple(text for place, text in enumerate(requests) if place % _FOLDS != fold)


def _discriminants(
    rows: Sequence[Described], vector_of: dict[str, NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(n, dim) and (n,) float32: linear discriminants, by the entries' means and the covariance around them."""
    means, residuals = [], []
    for row in rows:
        own = np.stack([vector_of[text] for text in (row.title, row.description, *row.requests)]).astype(np.float64)
        means.append(own.mean(axis=0))
        residuals.append(own - means[-1])
    mean, residual = np.stack(means), np.concatenate(residuals)
    covariance = residual.T @ residual / len(residual)
    covariance += (_SHRINK * np.trace(covariance) / len(covariance) + _TINY) * np.eye(len(covariance))
    dense = np.linalg.solve(covariance, mean.T).T
    bias = -0.5 * np.einsum("nd,nd->n", mean, dense)
    return dense.astype(np.float32), bias.astype(np.float32)


def postings(rows: Sequence[Described]) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.float32]]:
    """BM25 of each term for each entry that has it: where each bucket starts, entries, impacts."""
    counts = []
    for row in rows:
        count: Counter[int] = Counter()
        for text, weight in ((row.title, _NAME_WEIGHT), *((text, 1) for text in (row.description, *row.keywords))):
            for term in terms(text):
                count[term] += weight
        for text in row.requests:
            count.update(terms(text))
        counts.append(count)
    lengths = np.array([count.total() for count in counts], dtype=np.float64)
    having = Counter(term for count in counts for term in count)
    found: list[tuple[int, int, float]] = []
    for place, count in enumerate(counts):
        saturation = _K1 * (1 - _B + _B * lengths[place] / lengths.mean())
        for term, times in count.items():
            rarity = math.log(1 + (len(rows) - having[term] + 0.5) / (having[term] + 0.5))
            found.append((term, place, rarity * times * (_K1 + 1) / (times + saturation)))
    found.sort()
    buckets = np.array([term for term, _, _ in found], dtype=np.int64)
    starts = np.searchsorted(buckets, np.arange(BUCKETS + 1)).astype(np.int32)
    places = np.array([place for _, place, _ in found], dtype=np.uint16)
    return starts, places, np.array([impact for _, _, impact in found], dtype=np.float32)
