"""Runs a bundle's CoreML packages on macOS: compiled once, one text at a time, padded to the next length."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle import Bundle, Variant
from edge.device import CACHE, cache_folder
from edge.errors import BackendError, ChecksumError, ManifestError, MissingExtra, ProviderUnavailable
from edge.session import check_unit_rows

_INPUT, _OUTPUT = "input_ids", "embedding"
_LENGTH_ERROR = 0.01  # of a vector's length: its squares are summed in half precision, which alone makes 0.0006


def available() -> bool:
    """Whether packages can run here: on macOS, with coremltools installed."""
    return platform.system() == "Darwin" and importlib.util.find_spec("coremltools") is not None


class CoreMLBackend:
    """A CoreML package. Thread-safe: predictions wait for each other, as Apple asks of users of one ``MLModel``.

    The package makes its mask of the padding's id, so that a token of that id within a text counts as
    padding; tokenizers give it to no text but one that spells the padding token out.
    """

    def __init__(self, bundle: Bundle, variant: Variant, *, device: str = "auto") -> None:
        """Check a package's files, compile it where this was not done before, and load it.

        The compiled model is kept in a folder named after the package's content and the system's version, in
        :func:`edge.device.cache_folder`.

        Args:
            bundle: The opened bundle.
            variant: One of its variants of the runtime ``coreml``.
            device: ``auto`` for the compute units that the package was made for, or ``cpu``.

        Raises:
            ProviderUnavailable: This is no macOS, or ``device`` is neither of the two.
            MissingExtra: coremltools is not installed.
            ChecksumError: A file is missing or has changed.
            ManifestError: The manifest lacks what a package needs.
            BackendError: Core ML cannot compile or load the package.
        """
        if device not in ("auto", "cpu"):
            raise ProviderUnavailable(f"device {device!r} is not available in this version. Use 'auto' or 'cpu'.")
        if platform.system() != "Darwin":
            raise ProviderUnavailable(
                f"variant {variant.id!r} is a CoreML package, which runs on macOS and not on {platform.system()}. Use "
                "an onnx variant."
            )
        if importlib.util.find_spec("coremltools") is None:
            raise MissingExtra(f"the variant {variant.id}", "coreml")
        padding, units = variant.padding_id, variant.compute_units
        if not variant.lengths or padding is None or units is None or variant.package is None:
            raise ManifestError(
                f"{bundle.path}: the variant {variant.id!r} lacks shapes, padding_id, compute_units or package. Export "
                "it again."
            )
        self.dim = bundle.encoder.dim
        self._lengths, self._padding = variant.lengths, padding
        self._lock = threading.Lock()
        self._model = _load(bundle, variant, "CPU_ONLY" if device == "cpu" else units)

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the package on each row, padded at its end to the smallest length that holds it.

        Args:
            ids: (batch, tokens) int64 token ids, padded at the end.
            mask: (batch, tokens) int64; 1 for tokens, 0 for padding.

        Returns:
            (batch, dim) float32, rows of unit length.

        Raises:
            BackendError: A row is longer than the package takes, or Core ML fails.
            OutputError: The result has another shape, is not finite or not of unit length.
        """
        vectors = np.concatenate([self._predict(row[kept == 1]) for row, kept in zip(ids, mask, strict=True)])
        return unit_rows(vectors, (len(ids), self.dim))

    def _predict(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        length = next((length for length in self._lengths if length >= len(ids)), None)
        if length is None:
            raise BackendError(f"the package takes {self._lengths[-1]} tokens, not {len(ids)}. Shorten the text.")
        padded = np.full((1, length), self._padding, dtype=np.int32)
        padded[0, : len(ids)] = ids
        try:
            with self._lock:
                vector = self._model.predict({_INPUT: padded})[_OUTPUT]
        except Exception as error:  # coremltools raises RuntimeError, and Exception itself
            raise BackendError(f"Core ML cannot run {length} tokens ({error}). Run: ruvltra doctor") from None
        return np.asarray(vector, dtype=np.float32).reshape(1, -1)


def unit_rows(vectors: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A package's vectors, whose length half precision leaves a little off, brought to length 1.

    Raises:
        OutputError: They have another shape, are not finite or further off than half precision explains.
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    # What is further off is left as it is, and refused.
    rows: NDArray[np.float32] = vectors / np.where(np.abs(lengths - 1) < _LENGTH_ERROR, lengths, np.float32(1))
    check_unit_rows(rows, shape)
    return rows


def compiled(bundle: Bundle, variant: Variant) -> Path:
    """The folder of a variant's compiled model; compiled here where that was not done before.

    Raises:
        ChecksumError: A file of the package is missing or has changed.
        OSError: The model cannot be kept.
    """
    import coremltools as ct

    digest = hashlib.sha256("\n".join(file.sha256 for file in variant.files).encode())
    digest.update(f"\n{platform.mac_ver()[0]}\n{ct.__version__}".encode())
    kept = cache_folder() / f"{digest.hexdigest()[:32]}.mlmodelc"
    places = [bundle.locate(file) for file in variant.files]  # by hash, whether compiled before or not
    if not kept.is_dir():
        _compile(variant, places, kept)
    return kept


def _load(bundle: Bundle, variant: Variant, units: str) -> Any:
    """The compiled model, loaded; a kept one that does not load is compiled anew."""
    import coremltools as ct

    try:
        kept = compiled(bundle, variant)
        try:
            return ct.models.CompiledMLModel(str(kept), ct.ComputeUnit[units])
        except Exception:  # cut short, or of a system that was restored since
            shutil.rmtree(kept)
        return ct.models.CompiledMLModel(str(compiled(bundle, variant)), ct.ComputeUnit[units])
    except ChecksumError:
        raise
    except OSError as error:
        raise BackendError(
            f"compiled models cannot be kept ({error}). Make room, or name another folder in {CACHE}."
        ) from None
    except Exception as error:  # coremltools raises RuntimeError, and Exception itself
        raise BackendError(
            f"{bundle.path}: Core ML cannot load the variant {variant.id!r} ({error}). It needs {variant.minimum_os} "
            "or later; use an onnx variant."
        ) from None


def _compile(variant: Variant, places: list[Path | bytes], kept: Path) -> None:
    """Compile into a folder beside ``kept``, which then takes its place by one rename."""
    import coremltools as ct

    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".compiling.") as name:
        package = Path(name, "model.mlpackage")
        root = f"{Path(variant.model.file).parts[0]}/"
        for file, place in zip(variant.files, places, strict=True):
            path = package / file.file.removeprefix(root)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(place, Path):
                shutil.copyfile(place, path)
            else:
                path.write_bytes(place)
        compiled = Path(ct.models.utils.compile_model(str(package), str(Path(name, kept.name))))
        try:
            compiled.rename(kept)
        except OSError:
            if not kept.is_dir():  # else another process was quicker, with the same result
                raise
