"""Prototypes of agents, made of what they say of themselves, and kept from one process to the next.

They are kept in the user's cache folder, in a file for each encoder (a bundle and what runs it, as its last bits differ
with all of that): a row an agent, by a hash of what it is made of.
It is a cache and no more: a file that is broken, cannot be read or cannot be written changes nothing but the time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.agents import Agent
from edge.device import cache_folder, cpu_features
from edge.encoder import Encoder
from edge.files import replaced

_MOST = 4096  # agents that are kept, unless a single router has more
_FILES = 8  # encoders of which some are kept: after an update of the bundle or of ONNX Runtime there is one more
_LENGTH = 1e-3  # that a row's length may differ from 1


def prototypes(encoder: Encoder, agents: Sequence[Agent]) -> NDArray[np.float32]:
    """A prototype an agent: the mean of its description and examples.

    Args:
        encoder: Embeds them; prototypes that it has made on this device before are taken from the cache folder.
        agents: In the order of the rows.

    Returns:
        (agents, dim) float32 unit rows, the same whether they were kept or are made now.
    """
    if encoder.placement is None:  # put together by hand: nobody knows what it is
        return _made(encoder, agents)
    chosen = encoder.placement.candidate
    ways = f"{encoder.bundle_id} {chosen} {sorted(chosen.options.items())} {ort.__version__} {sorted(cpu_features())}"
    path = cache_folder() / "prototypes" / f"{hashlib.sha256(ways.encode()).hexdigest()[:32]}.npy"
    keys = [hashlib.sha256(json.dumps(_texts(agent)).encode()).digest() for agent in agents]
    kept = _kept(path, encoder.dim)
    lacking = [place for place, key in enumerate(keys) if key not in kept]
    if lacking:
        made = _made(encoder, [agents[place] for place in lacking])
        kept.update({keys[place]: row for place, row in zip(lacking, made, strict=True)})
        own = dict.fromkeys(keys)
        older = [key for key in kept if key not in own][: max(0, _MOST - len(own))]
        with contextlib.suppress(OSError):
            _keep(path, {key: kept[key] for key in (*own, *older)})
    return np.stack([kept[key] for key in keys])


def _texts(agent: Agent) -> list[str]:
    return [*([f"{agent.name}: {agent.description}"] if agent.description else []), *agent.examples]


def _made(encoder: Encoder, agents: Sequence[Agent]) -> NDArray[np.float32]:
    texts = [_texts(agent) for agent in agents]
    vectors = encoder.encode(itertools.chain.from_iterable(texts))  # in one call: one text a core
    ends = np.cumsum([len(own) for own in texts])
    means = np.stack([part.mean(axis=0) for part in np.split(vectors, ends[:-1])])
    rows: NDArray[np.float32] = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
    return rows


def _kept(path: Path, dim: int) -> dict[bytes, NDArray[np.float32]]:
    """Rows by key; none if the file is not what :func:`_keep` wrote."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return {}
        table = np.load(io.BytesIO(data[32:]), allow_pickle=False)
        rows = table["row"]
        if rows.dtype != np.float32 or rows.shape[1:] != (dim,) or table["key"].dtype != "V32":
            return {}
        if not (np.abs(np.linalg.norm(rows, axis=1) - 1) < _LENGTH).all():  # which is false for NaN as well
            return {}
        return {key.tobytes(): row for key, row in zip(table["key"], rows, strict=True)}
    except (OSError, ValueError, KeyError, IndexError, EOFError, SyntaxError):
        return {}


def _keep(path: Path, rows: dict[bytes, NDArray[np.float32]]) -> None:
    """Write rows whole; of two processes that write at the same time the last one's stay."""
    dim = len(next(iter(rows.values())))
    table = np.empty(len(rows), dtype=[("key", "V32"), ("row", "<f4", (dim,))])
    table["key"] = [np.void(key) for key in rows]
    table["row"] = list(rows.values())
    stream = io.BytesIO()
    np.save(stream, table, allow_pickle=False)
    data = stream.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        partial.write_bytes(hashlib.sha256(data).digest() + data)
    for old in sorted(path.parent.iterdir(), key=lambda other: other.stat().st_mtime, reverse=True)[_FILES:]:
        old.unlink()
