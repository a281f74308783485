"""Runs a language model's generating graph: token ids to logits and states, keys and values kept in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.bundle import Bundle
from edge.bundle import Generator as Listed
from edge.errors import BackendError
from edge.session import check_unit_rows, session_options

STEP = 512  # tokens that are read at a time, so that memory does not grow by what a layer computes for a whole text


class Sizes(NamedTuple):
    """Of the keys and values that attention keeps of each token, in every layer."""

    layers: int
    heads: int
    values: int


class Cache:
    """What attention keeps of the tokens that were read: a key and a value a layer. For one thread at a time.

    The graph writes new ones behind the old ones, into the same buffers: nothing is copied from step to step.

    Attributes:
        ids: The tokens that were read.
        room: How many there can be.
    """

    def __init__(self, sizes: Sizes, room: int) -> None:
        """Make the buffers, 2 * layers * heads * room * values float32."""
        self.ids: list[int] = []
        self.room = room
        self.buffers = {
            f"{layer}.{kind}": ort.OrtValue.ortvalue_from_numpy(
                np.zeros((1, sizes.heads, room, sizes.values), dtype=np.float32)
            )
            for layer in range(sizes.layers)
            for kind in ("key", "value")
        }

    def cut(self, count: int) -> None:
        """Forget all tokens but the first so many."""
        del self.ids[count:]


class Decoder:
    """A generating graph, loaded. Thread-safe, each thread with a cache of its own."""

    def __init__(self, session: ort.InferenceSession, sizes: Sizes) -> None:
        """Of a session with the inputs and outputs of ``docs/bundle.schema.json``; :func:`open_decoder` makes one."""
        self.sizes = sizes
        self._session = session

    def read(self, cache: Cache, ids: Sequence[int]) -> None:
        """Read tokens whose logits nobody wants."""
        for start in range(0, len(ids), STEP):
            self.run(cache, ids[start : start + STEP], [0])

    def run(
        self,
        cache: Cache,
        ids: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int] | None = None,
        bias: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Read tokens behind those of the cache, which has them afterwards.

        Args:
            cache: Has room for them.
            ids: At least one.
            rows: Of which of them the logits are wanted.
            positions: Their positions, where they are not one behind another; the cache must hold a token then.
            bias: (tokens, tokens with those of the cache) float32, added to the logits of attention.

        Returns:
            (rows, vocabulary) float32 logits.

        Raises:
            BackendError: The graph cannot run, or gives values that are not finite.
        """
        return self._run("logits", cache, ids, rows, positions, bias)

    def embed(self, ids: Sequence[int], pooling: str) -> NDArray[np.float32]:
        """(dim,) float32 unit vector of a text of any length, read in steps.

        Args:
            ids: At least one.
            pooling: ``mean`` or ``last``.

        Raises:
            BackendError: As :meth:`run`.
            OutputError: The states have no length.
        """
        cache = Cache(self.sizes, len(ids))
        total = None
        for start in range(0, len(ids), STEP):
            states = self._run("states", cache, ids[start : start + STEP], [0])[0]
            part = states.sum(axis=0, dtype=np.float64)
            total = states[-1] if pooling == "last" else part if total is None else total + part
        assert total is not None
        vectors = (total / np.linalg.norm(total)).astype(np.float32)[None]
        check_unit_rows(vectors, vectors.shape)
        vector: NDArray[np.float32] = vectors[0]
        return vector

    def _run(
        self,
        wanted: str,
        cache: Cache,
        ids: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int] | None = None,
        bias: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        seen = len(cache.ids)
        total = seen + len(ids)
        assert total <= cache.room
        binding = self._session.io_binding()
        fed = {
            "input_ids": np.array([ids], dtype=np.int64),
            "position_ids": np.array([positions or range(seen, total)], dtype=np.int64),
            "attention_bias": np.zeros((1, 1, len(ids), total), dtype=np.float32) if bias is None else bias[None, None],
            "lengths": np.array([total - 1], dtype=np.int32),
            "total": np.array(total, dtype=np.int32),
            "rows": np.array(rows, dtype=np.int64),
        }
        for name, values in fed.items():
            binding.bind_cpu_input(name, values)
        for name, buffer in cache.buffers.items():
            binding.bind_ortvalue_input(f"past.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        binding.bind_output(wanted)
        try:
            self._session.run_with_iobinding(binding)
            found: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        except Exception as error:  # ONNX Runtime raises ValueError and a dozen types of its own
            raise BackendError(f"the model cannot run {len(ids)} tokens ({error}). Run: ruvltra doctor") from None
        if not np.isfinite(found).all():
            raise BackendError("the model gave values that are not finite. Run: ruvltra doctor")
        cache.ids.extend(ids)
        return found


def open_decoder(bundle: Bundle, listed: Listed, threads: int | None) -> Decoder:
    """Load a generating graph on the CPU.

    Args:
        bundle: The opened bundle.
        listed: One of its generators; its files are checked by hash here.
        threads: None for one a physical core.

    Raises:
        ChecksumError: A file is missing or has changed.
        BackendError: The graph cannot be loaded.
    """
    from edge.device import detect

    graph = bundle.read(listed.model)
    name = PurePosixPath(listed.weights.file).name
    options = session_options(detect().threads if threads is None else threads, bundle.locate(listed.weights), name)
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(
            f"{listed.model.file}: ONNX Runtime {ort.__version__} cannot load it ({error}). Install a version of "
            "onnxruntime from this package's tested range."
        ) from None
    return Decoder(session, Sizes(listed.layers, listed.kv_heads, listed.head_dim))
