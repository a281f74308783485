"""The seam to whatever runs the network: a back end turns ids and a mask into unit vectors."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.bundle import Bundle, Variant
from edge.errors import BackendError, OutputError, ProviderUnavailable

MAX_THREADS = 256
# ONNX Runtime's own fusions that make a graph slower: its SkipLayerNormalization is not vectorised
# (1.32.0; a fifth of an int8 encoder's time).
NOT_FUSED = ["SkipLayerNormFusion"]
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class Backend(Protocol):
    """One method: token ids in, unit vectors out."""

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """(batch, tokens) ids and mask to (batch, dim) float32 unit rows."""
        ...


class OnnxBackend:
    """An ONNX Runtime session on the CPU. Thread-safe: sessions may run concurrently."""

    def __init__(self, bundle: Bundle, variant: Variant, *, device: str = "auto", threads: int | None = None) -> None:
        """Load a variant's graph.

        Args:
            bundle: The opened bundle.
            variant: One of its variants; its file is checked by hash here.
            device: ``auto`` or ``cpu``.
            threads: Threads for one run; None takes 1, the fastest for short texts on shared cores.

        Raises:
            ProviderUnavailable: ``device`` is neither of the two.
            BackendError: The graph cannot be loaded, or ``threads`` is not positive.
        """
        if device not in ("auto", "cpu"):
            raise ProviderUnavailable(f"device {device!r} is not available in this version. Use 'auto' or 'cpu'.")
        if variant.runtime != "onnx":
            raise ProviderUnavailable(
                f"variant {variant.id!r} needs the runtime {variant.runtime!r}. Use an onnx variant."
            )
        threads = 1 if threads is None else threads
        if not 1 <= threads <= MAX_THREADS:
            raise BackendError(f"threads must be 1 to {MAX_THREADS}, not {threads}. Leave it out for the default.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        graph = bundle.read(variant.model)
        # A graph without listed weights may not pull in files that nobody checked.
        if variant.weights is None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(bundle.path / "no-weights-are-listed"))
        else:
            weights = bundle.locate(variant.weights)
            if isinstance(weights, bytes):
                name = PurePosixPath(variant.weights.file).name
                options.add_external_initializers_from_files_in_memory([name], [weights], [len(weights)])
            else:
                # Mapped by ONNX Runtime: no copy, and processes share the pages.
                options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights.parent))
        try:
            self._session = ort.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=NOT_FUSED
            )
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise BackendError(
                f"{variant.model.file}: ONNX Runtime {ort.__version__} cannot load it ({error}). "
                "Install a version of onnxruntime from this package's tested range."
            ) from None
        self.dim = bundle.encoder.dim

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the graph and check what comes out.

        Args:
            ids: (batch, tokens) int64 token ids.
            mask: (batch, tokens) int64; 1 for tokens, 0 for padding.

        Returns:
            (batch, dim) float32, rows of unit length.

        Raises:
            OutputError: The result has another shape, is not finite or not of unit length.
        """
        try:
            vectors = self._session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        except Exception as error:  # ONNX Runtime raises ValueError and a dozen types of its own
            raise BackendError(f"the model cannot run {ids.shape[1]} tokens ({error}). Run: ruvltra doctor") from None
        check_unit_rows(vectors, (ids.shape[0], self.dim))
        result: NDArray[np.float32] = vectors
        return result


def check_unit_rows(vectors: object, shape: tuple[int, ...]) -> None:
    """Raise OutputError unless ``vectors`` is an array of this shape with finite rows of unit length."""
    if not isinstance(vectors, np.ndarray):
        raise OutputError(f"the model returned {type(vectors).__name__}, an array expected. Run: ruvltra doctor")
    if vectors.shape != shape or vectors.dtype != np.float32:
        raise OutputError(
            f"the model returned {vectors.dtype} {vectors.shape}, float32 {shape} expected. Run: ruvltra doctor"
        )
    squares = np.vecdot(vectors, vectors)
    # NaN compares false, so this catches values that are not finite as well.
    if squares.size and not (squares.min() > 1 - 1e-3 and squares.max() < 1 + 1e-3):
        raise OutputError("the model returned vectors that are not finite and of unit length. Run: ruvltra doctor")
