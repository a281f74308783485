"""The seam to whatever runs the network: a back end turns ids and a mask into unit vectors."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.bundle import Bundle, Variant
from edge.errors import BackendError, OutputError, ProviderUnavailable
from edge.providers import (
    CPU,
    KNOWN,
    LENGTHS,
    Candidate,
    Known,
    first_line,
    hardware_of,
    plugin_package,
    register,
)

MAX_THREADS = 256
# ONNX Runtime's own fusions that make a graph slower: its SkipLayerNormalization is not vectorised
# (1.32.0; a fifth of an int8 encoder's time).
NOT_FUSED = ["SkipLayerNormFusion"]
_FLOAT32 = np.dtype(np.float32)
_OUTPUTS = ["sentence_embedding"]
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class Backend(Protocol):
    """One method: token ids in, unit vectors out."""

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """(batch, tokens) ids and mask to (batch, dim) float32 unit rows."""
        ...


class Placement(NamedTuple):
    """Where a loaded graph runs, read back from ONNX Runtime.

    Attributes:
        candidate: What was loaded.
        reason: Why it was chosen.
        nodes: Number of the graph's operations by provider, as ONNX Runtime names them; empty for a back end that
            does not tell (Core ML, those of other packages).
    """

    candidate: Candidate
    reason: str
    nodes: Mapping[str, int]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"candidate": self.candidate._asdict(), "share": self.share}

    @property
    def share(self) -> float | None:
        """Share of the operations that run on the candidate's own provider; None where that is not known."""
        return self.own() / sum(self.nodes.values()) if self.nodes else None

    def own(self) -> int:
        """Number of operations that run on the candidate's own provider."""
        known = KNOWN.get(self.candidate.provider)
        return self.nodes.get(self.candidate.provider if known is None else known.provider, 0)

    def __str__(self) -> str:
        total = sum(self.nodes.values())
        where = ", ".join(f"{count} of {total} operations on {name}" for name, count in self.nodes.items())
        return f"{self.candidate}: {where or 'placement unknown'}; {self.reason}"


class OnnxBackend:
    """ONNX Runtime sessions. Thread-safe: sessions may run concurrently.

    A provider that compiles one graph a shape gets a session for each of ``LENGTHS`` that occurs, made when it does.
    """

    def __init__(self, bundle: Bundle, variant: Variant, candidate: Candidate) -> None:
        """Load a variant's graph.

        Args:
            bundle: The opened bundle.
            variant: One of its variants; its files are checked by hash here.
            candidate: Where it shall run.

        Raises:
            ProviderUnavailable: The provider is not installed, or ONNX Runtime passed over it.
            BackendError: The graph cannot be loaded.
        """
        if variant.runtime != "onnx":
            raise ProviderUnavailable(
                f"variant {variant.id!r} needs the runtime {variant.runtime!r}. Use an onnx variant."
            )
        self.dim = bundle.encoder.dim
        self._candidate = candidate
        self._known = KNOWN.get(candidate.provider) or Known(candidate.provider)
        self._file = variant.model.file
        self._graph = bundle.read(variant.model)
        self._weights = None if variant.weights is None else bundle.locate(variant.weights)
        self._weights_name = "" if variant.weights is None else PurePosixPath(variant.weights.file).name
        self._nowhere = bundle.path / "no-weights-are-listed"
        self._lengths = [n for n in LENGTHS if n < bundle.encoder.max_length] + [bundle.encoder.max_length]
        self._lock = threading.Lock()
        self._sessions: dict[int, ort.InferenceSession] = {}  # by length; 0 for any
        self._session(self._lengths[0] if self._known.static else 0)

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the graph and check what comes out.

        Args:
            ids: (batch, tokens) int64 token ids.
            mask: (batch, tokens) int64; 1 for tokens, 0 for padding.

        Returns:
            (batch, dim) float32, rows of unit length.

        Raises:
            BackendError: The graph cannot run these shapes.
            OutputError: The result has another shape, is not finite or not of unit length.
        """
        try:
            if self._known.static:
                vectors = np.concatenate(
                    [self._fixed(row[None], kept[None]) for row, kept in zip(ids, mask, strict=True)]
                )
            else:
                vectors = self._sessions[0].run(_OUTPUTS, {"input_ids": ids, "attention_mask": mask})[0]
        except BackendError:
            raise
        except Exception as error:  # ONNX Runtime raises ValueError and a dozen types of its own
            raise BackendError(f"the model cannot run {ids.shape[1]} tokens ({error}). Run: ruvltra doctor") from None
        check_unit_rows(vectors, (ids.shape[0], self.dim))
        result: NDArray[np.float32] = vectors
        return result

    def nodes(self) -> dict[str, int]:
        """Number of the graph's operations by provider, before ONNX Runtime fuses more of them."""
        session = next(iter(self._sessions.values()))
        counts: Counter[str] = Counter()
        for part in session.get_provider_graph_assignment_info():
            counts[part.ep_name] += len(part.get_nodes())
        return dict(counts)

    def _fixed(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """One text, padded at its end to a length that there is a session for."""
        length = next((n for n in self._lengths if n >= ids.shape[1]), ids.shape[1])
        padding = ((0, 0), (0, length - ids.shape[1]))
        fed = {"input_ids": np.pad(ids, padding), "attention_mask": np.pad(mask, padding)}
        result: NDArray[np.float32] = self._session(length).run(None, fed)[0]
        return result

    def _session(self, length: int) -> ort.InferenceSession:
        with self._lock:
            if length not in self._sessions:
                self._sessions[length] = self._load(length)
            return self._sessions[length]

    def _load(self, length: int) -> ort.InferenceSession:
        candidate, name = self._candidate, self._known.provider
        # A graph without listed weights may not pull in files that nobody checked.
        weights = self._nowhere / "none" if self._weights is None else self._weights
        options = session_options(candidate.threads, weights, self._weights_name)
        options.enable_mem_pattern = candidate.provider != "directml"  # which does without, says its documentation
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(candidate.spinning)))
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if length:
            options.add_free_dimension_override_by_name("batch", 1)
            options.add_free_dimension_override_by_name("tokens", length)
        listed: list[Any] = [CPU]
        try:
            package = None if name == CPU else plugin_package(name)
            if package is not None:
                register(package)
                options.add_provider_for_devices(hardware_of(name, candidate.hardware), dict(candidate.options))
                listed = []
            elif name != CPU:
                listed = [(name, dict(candidate.options)), CPU]
            session = ort.InferenceSession(
                self._graph, options, providers=listed or None, disabled_optimizers=NOT_FUSED
            )
        except Exception as error:
            known = isinstance(error, RuntimeError | ValueError)  # which its bindings raise for bad options
            if not known and not type(error).__module__.startswith("onnxruntime"):
                raise
            raise BackendError(
                f"{self._file}: ONNX Runtime {ort.__version__} cannot load it for {candidate.provider} "
                f"({first_line(error)}). Install a version of onnxruntime from this package's tested range, or use "
                "another variant or device."
            ) from None
        if name not in session.get_providers():  # ONNX Runtime only logs that it went on without
            raise ProviderUnavailable(
                f"ONNX Runtime {ort.__version__} passed over {name} and took {', '.join(session.get_providers())}. "
                "Use another device."
            )
        return session


def session_options(threads: int, weights: Path | bytes, name: str) -> ort.SessionOptions:
    """What every session on a bundle's graph is told.

    Args:
        threads: For one text.
        weights: The file of weights beside the graph, or its content.
        name: By which the graph calls it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Arm's kernels for processors with SME give wrong vectors for int8 (1.26.0, seen under emulation by
    # scripts/embedded-check; a real one has yet to be tried). ONNX Runtime's own kernels do not.
    options.add_session_config_entry("mlas.disable_kleidiai", "1")
    if isinstance(weights, bytes):
        options.add_external_initializers_from_files_in_memory([name], [weights], [len(weights)])
    else:
        # Mapped by ONNX Runtime: no copy, and processes share the pages.
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights.parent))
    return options


def check_unit_rows(vectors: object, shape: tuple[int, ...]) -> None:
    """Raise OutputError unless ``vectors`` is an array of this shape with finite rows of unit length."""
    if not isinstance(vectors, np.ndarray):
        raise OutputError(f"the model returned {type(vectors).__name__}, an array expected. Run: ruvltra doctor")
    if vectors.shape != shape or vectors.dtype != _FLOAT32:
        raise OutputError(
            f"the model returned {vectors.dtype} {vectors.shape}, float32 {shape} expected. Run: ruvltra doctor"
        )
    # Row by row: for the usual single one numpy's operations on all of them take longer.
    # NaN compares false, so this catches values that are not finite as well.
    if not all(1 - 1e-3 < row.dot(row) < 1 + 1e-3 for row in vectors):
        raise OutputError("the model returned vectors that are not finite and of unit length. Run: ruvltra doctor")
