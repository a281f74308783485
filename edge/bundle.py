"""Bundles: one folder (or zip) that holds all a device needs, checked by hash before use.

``bundle.json`` lists every other file with its size and sha256; ``bundle.json.sha256`` holds the
digest of ``bundle.json`` in the format of the ``sha256sum`` tool. The JSON schema is
``docs/bundle.schema.json``.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.agents import Agent, agents_from_records
from edge.errors import AgentError, BundleError, ChecksumError, ManifestError, VersionError

FORMAT = 1
MANIFEST = "bundle.json"
MANIFEST_DIGEST = "bundle.json.sha256"
_MANIFEST_LIMIT = 16 * 1024 * 1024  # bytes; read before its hash is known
_POOLING = {"cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last"}
_COPY_AGAIN = "Copy the bundle again from where it came from, or export it again."


class File(NamedTuple):
    """A file of the bundle: path relative to it, size in bytes, sha256."""

    file: str
    bytes: int
    sha256: str


class Calibration(NamedTuple):
    """How one strategy turns signals into probabilities.

    The probability of agent a is the softmax of ``cosine * cos(task, prototype of a) + matched *
    [a keyword of a occurs] + first * [a is the keyword rules' choice]``. One more term of the
    softmax stands for "nobody": ``out_of_scope``, plus ``cosine * cos(task, out-of-scope
    prototype)`` where the head has that prototype; it is left out if ``out_of_scope`` is None.
    Below ``threshold`` the router abstains.
    """

    cosine: float
    matched: float
    first: float
    out_of_scope: float | None
    threshold: float


@dataclass(frozen=True, slots=True)
class Variant:
    """One executable form of the encoder.

    Attributes:
        id: Name within the bundle, such as ``int8``.
        runtime: ``onnx`` or ``coreml``.
        model: The model file; for ``onnx`` the graph.
        weights: The graph's weights as ONNX external data, which is mapped and not copied; None if
            the model file holds them.
        precision: How weights and activations are held.
        minimum_cosine: Bound on the cosine to the fp32 vectors that the exporter enforced.
        calibration: By ``trained`` (the bundle's own agents) or ``custom``, then by strategy.
        calibrated_on: Name of the labelled data it was fitted on, and of the bundle where that was
            another one; None if it was not fitted, so that confidences are no probabilities.
        parity: The exporter's measurements.
        lengths: The numbers of tokens that a CoreML package takes, ascending; empty where any does.
        package: A CoreML package's own list of its files; ``model`` and ``weights`` lie within it, too.
        compute_units: What a CoreML package is made for, by coremltools' name; None for ``onnx``.
        minimum_os: The oldest systems that load a CoreML package; None for ``onnx``.
        padding_id: What a CoreML package makes its mask of; None for ``onnx``.
    """

    id: str
    runtime: str
    model: File
    weights: File | None
    precision: str
    minimum_cosine: float
    calibration: Mapping[str, Mapping[str, Calibration]]
    calibrated_on: str | None
    parity: Mapping[str, float]
    lengths: tuple[int, ...]
    package: File | None
    compute_units: str | None
    minimum_os: str | None
    padding_id: int | None

    @property
    def files(self) -> tuple[File, ...]:
        """All of them."""
        return tuple(file for file in (self.model, self.weights, self.package) if file is not None)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


class Generator(NamedTuple):
    """A graph that generates text, token by token, with a key/value cache.

    Attributes:
        id: Name within the bundle, such as ``fp32``.
        model: The graph.
        weights: Its weights as ONNX external data.
        precision: How weights and activations are held.
        layers: Number of layers, each with a key and a value in the cache.
        kv_heads: Heads of a key or value.
        head_dim: Values of a head.
        end_ids: Token ids that end a text.
        prompt: What asks for an agent's name; ``{task}`` stands for the task.
        prior: The weight of what it says of an empty task, beside what it says of the task.
        calibration: How the sum of the two, in place of the cosine, becomes a probability.
        calibrated_on: As for a variant.
    """

    id: str
    model: File
    weights: File
    precision: str
    layers: int
    kv_heads: int
    head_dim: int
    end_ids: tuple[int, ...]
    prompt: str
    prior: float
    calibration: Calibration
    calibrated_on: str | None


class Catalogue(NamedTuple):
    """A catalogue of capabilities: its entries, and what finds them (:mod:`edge.capabilities`)."""

    entries: File
    scorer: File


class EncoderSpec(NamedTuple):
    """What goes in and comes out of every variant."""

    dim: int
    max_length: int
    pooling: str
    normalised: bool
    prompt: str


class Linear(NamedTuple):
    """A linear head: (agents + 1, dim) and (agents + 1,) float32; the last row is out of scope.

    Its scores are on the scale of cosines.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


class Head(NamedTuple):
    """What was trained on top of the encoder; float32.

    Attributes:
        prototypes: (agents, prototypes an agent, dim), unit length. An agent's similarity is that
            of its nearest prototype.
        out_of_scope: (dim,), unit length: tasks that are no software work.
        linear: Decides in the prototypes' stead, where there is one.
    """

    prototypes: NDArray[np.float32]
    out_of_scope: NDArray[np.float32]
    linear: Linear | None = None


class Golden(NamedTuple):
    """A text with its token ids and its fp32 unit vector, to prove a tokenizer and a model by."""

    text: str
    ids: tuple[int, ...]
    vector: NDArray[np.float32]


class Bundle:
    """An opened bundle. All files but the models are already checked; a model is when it is read."""

    def __init__(self, source: _Folder | _Zip) -> None:
        self._source = source
        self._ahead: dict[File, _Ahead] = {}
        self.path = source.path
        raw = source.read(MANIFEST, None)
        digest = source.read(MANIFEST_DIGEST, 256)
        if digest != manifest_digest(raw):
            raise ChecksumError(
                f"{source.name(MANIFEST)}: does not match {MANIFEST_DIGEST}, so one of the two was changed or cut "
                f"short. {_COPY_AGAIN}"
            )
        self.manifest = raw
        where = source.name(MANIFEST)
        manifest = _Table(_json(raw, where), where)
        version = manifest.integer("format")
        if version != FORMAT:
            raise VersionError(
                f"{where}: format {version}, but this version reads format {FORMAT}. Update ruvltra-edge."
            )
        self.name = manifest.string("name")
        self.version = manifest.string("version")
        self.licence = manifest.string("licence")
        self.base_model = manifest.string("base_model")
        self.tools: dict[str, str] = dict(manifest.table("tools").values)
        encoder = manifest.table("encoder")
        self.encoder = EncoderSpec(
            dim=encoder.integer("dim", 1),
            max_length=encoder.integer("max_length", 3),
            pooling=encoder.string("pooling"),
            normalised=encoder.boolean("normalised"),
            prompt=encoder.string("prompt"),
        )
        self.variants = tuple(_variant(table) for table in manifest.tables("variants"))
        if not self.variants:
            raise ManifestError(f"{where}: lists no variants. {_COPY_AGAIN}")
        if len({variant.id for variant in self.variants}) < len(self.variants):
            raise ManifestError(f"{where}: two variants have the same id. {_COPY_AGAIN}")
        if not set(self.encoder.pooling.split("+")) <= _POOLING or not self.encoder.normalised:
            known = ", ".join(sorted(_POOLING))
            raise ManifestError(f"{where}: the encoder must pool by one of {known} and normalise. {_COPY_AGAIN}")
        self.default_variant = manifest.string("default_variant")
        self.variant(self.default_variant)
        generators = manifest.tables("generators") if "generators" in manifest.values else []
        self.generators = tuple(_generator(table) for table in generators)
        documents = manifest.tables("documents") if "documents" in manifest.values else []
        self.documents = tuple(_file(table) for table in documents)  # for people; nothing here reads them
        catalogue = manifest.table("capabilities") if manifest.values.get("capabilities") is not None else None
        self.catalogue = (
            None
            if catalogue is None
            else Catalogue(_file(catalogue.table("entries")), _file(catalogue.table("scorer")))
        )
        self.files = {key: _file(manifest.table(key)) for key in ("tokenizer", "agents", "goldens")}
        content = {key: self.read(file) for key, file in self.files.items()}
        for file in self.documents:
            self.read(file)
        self.id = hashlib.sha256(raw).hexdigest()
        self.tokenizer = content["tokenizer"]
        self._load_agents(content["agents"])
        self._goldens = content["goldens"]

    @property
    def encoder_id(self) -> str:
        """What the encoder computes, as a hash of tokenizer and goldens; the same for all variants.

        Vectors of one such id may be compared. Agents, calibration or a further variant do not change it.
        """
        parts = (self.files["tokenizer"].sha256, self.files["goldens"].sha256)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @classmethod
    def open(cls, path: str | Path | None = None) -> Bundle:
        """Open and verify a bundle.

        Args:
            path: A folder or a zip file; None opens the bundle that comes with this package.

        Raises:
            ManifestError: There is no bundle here, or its manifest is inconsistent.
            ChecksumError: A file is missing, has changed, was cut short or is a link.
            VersionError: The bundle's format is not one that this version reads.
        """
        if path is not None and not str(path):
            raise ManifestError("the path of the bundle is empty. Give a folder or a zip file.")
        folder = default_bundle() if path is None else Path(path)
        if folder.is_dir():
            return cls(_Folder(folder))
        if folder.is_file():
            return cls(_Zip(folder))
        raise ManifestError(f"{folder}: no bundle here. Give a folder with {MANIFEST} in it, or such a folder zipped.")

    def variant(self, variant_id: str | None = None) -> Variant:
        """The variant of this id, or the default one.

        Raises:
            BundleError: There is none of this id.
        """
        wanted = self.default_variant if variant_id is None else variant_id
        for variant in self.variants:
            if variant.id == wanted:
                return variant
        have = ", ".join(variant.id for variant in self.variants)
        raise BundleError(f"{self.path}: no variant {wanted!r}. Choose one of: {have}.")

    def read(self, file: File) -> bytes:
        """Read a file of the bundle and check it.

        Raises:
            ChecksumError: It is missing, has changed, was cut short or is a link.
        """
        data = self._source.read(file.file, file.bytes)
        self._check(file, len(data), hashlib.sha256(data).hexdigest())
        return data

    def locate(self, file: File) -> Path | bytes:
        """Check a file and say where it can be mapped from; out of a zip, its content.

        Raises:
            ChecksumError: As for :meth:`read`.
        """
        if isinstance(self._source, _Zip):
            return self.read(file)
        path = self._source.locate(file.file)
        ahead = self._ahead.pop(file, None)
        try:
            with path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                size = status.st_size
                if ahead is not None and ahead.state == _state(status):
                    ahead.thread.join()
                    digest = ahead.digests[0]
                else:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest() if size == file.bytes else ""
        except OSError as error:
            raise _refusal(path, error) from None
        self._check(file, size, digest)
        return path

    def hash_ahead(self, file: File) -> None:
        """Begin to hash a file that :meth:`locate` will be asked for, in the background; what is wrong, that says.

        In one call on the mapped file, so that the interpreter is free for as long as it takes.
        """
        if isinstance(self._source, _Zip):
            return
        try:
            with self._source.locate(file.file).open("rb") as stream:
                status = os.fstat(stream.fileno())
                if status.st_size != file.bytes:
                    return
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (BundleError, OSError, ValueError):
            return
        digests: list[str] = []
        thread = threading.Thread(target=lambda: digests.append(hashlib.sha256(mapped).hexdigest()), daemon=True)
        self._ahead[file] = _Ahead(thread, digests, _state(status))
        thread.start()

    def _check(self, file: File, size: int, digest: str) -> None:
        if size != file.bytes or digest != file.sha256:
            raise ChecksumError(
                f"{self._source.name(file.file)}: has changed or was cut short (sha256 differs, {size} bytes, "
                f"{file.bytes} expected). {_COPY_AGAIN}"
            )

    def _load_agents(self, data: bytes) -> None:
        where = self._source.name(self.files["agents"].file)
        table = _Table(_json(data, where), where)
        try:
            self.agents: tuple[Agent, ...] = tuple(agents_from_records(table.items("agents"), where))
        except AgentError as error:
            raise ManifestError(f"{error} {_COPY_AGAIN}") from None
        self.head: Head | None = None
        if table.values.get("head") is not None:
            head = table.table("head")
            dim, count = self.encoder.dim, len(self.agents)
            linear = None
            if head.values.get("linear") is not None:
                table = head.table("linear")
                linear = Linear(
                    _matrix(table.items("weight"), (count + 1, dim), where, unit=False),
                    _matrix(table.items("bias"), (count + 1,), where, unit=False),
                )
            rows = head.items("prototypes")
            several = len(rows[0]) if rows and isinstance(rows[0], list) else 0
            self.head = Head(
                _matrix(rows, (count, several, dim), where),
                _matrix(head.items("out_of_scope"), (dim,), where),
                linear,
            )

    def goldens(self, most: int | None = None) -> list[Golden]:
        """Parse the goldens, or the first of them."""
        where = self._source.name(self.files["goldens"].file)
        goldens = []
        for row in _Table(_json(self._goldens, where), where).tables("goldens")[:most]:
            ids = row.items("ids")
            if not all(isinstance(item, int) for item in ids):
                raise ManifestError(f"{where}: ids must be integers. {_COPY_AGAIN}")
            vector = _matrix(row.items("vector"), (self.encoder.dim,), where)
            goldens.append(Golden(row.string("text"), tuple(ids), vector))
        return goldens

    def capabilities(self) -> list[tuple[list[str], str]]:
        """Ids and description of each entry of the catalogue; none if there is no catalogue.

        Raises:
            ChecksumError: The file is missing, has changed or was cut short.
            ManifestError: It is not what the format says.
        """
        if self.catalogue is None:
            return []
        where = self._source.name(self.catalogue.entries.file)
        entries = []
        for row in _Table(_json(self.read(self.catalogue.entries), where), where).tables("entries"):
            ids = row.items("ids")
            if not ids or not all(isinstance(name, str) and name for name in ids):
                raise ManifestError(f"{row.where}: ids must be texts, at least one. {_COPY_AGAIN}")
            entries.append((ids, row.string("description")))
        return entries


def default_bundle() -> Path:
    """The folder of the bundle that comes with this package.

    Raises:
        ManifestError: The package was installed without it.
    """
    here = Path(__file__).resolve().parent
    # In a wheel the bundle lies inside the package; in a checkout it is in models/.
    for folder in (here / "default_bundle", here.parent / "models" / "ruvltra-mini" / "bundle"):
        if (folder / MANIFEST).exists():
            return folder
    raise ManifestError(f"{here}: the default bundle is missing from this installation. Reinstall ruvltra-edge.")


def manifest_digest(manifest: bytes) -> bytes:
    """Content of ``bundle.json.sha256`` for this ``bundle.json``."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


class _Ahead(NamedTuple):
    """A hash that is being computed: the thread, where it puts it, and the state of the file that it is of."""

    thread: threading.Thread
    digests: list[str]
    state: tuple[int, ...]


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def name(self, file: str) -> str:
        return str(self.path / file)

    def locate(self, file: str) -> Path:
        path = self.path
        for part in _safe(file).parts:
            path = path / part
            try:
                mode = path.lstat().st_mode
            except (OSError, ValueError) as error:
                raise _refusal(path, error) from None
            if stat.S_ISLNK(mode):
                raise ChecksumError(f"{path}: is a link; a bundle holds plain files only. {_COPY_AGAIN}")
        if not stat.S_ISREG(mode):
            raise ChecksumError(f"{path}: is not a plain file. {_COPY_AGAIN}")
        return path

    def read(self, file: str, size: int | None) -> bytes:
        path = self.locate(file)
        try:
            with path.open("rb") as stream:
                # One byte more than listed shows that a file has grown without reading all of it.
                limit = _MANIFEST_LIMIT if size is None else size + 1
                return stream.read(min(limit, os.fstat(stream.fileno()).st_size + 1))
        except OSError as error:
            raise _refusal(path, error) from None


def _refusal(path: Path, error: OSError | ValueError) -> ChecksumError:
    if isinstance(error, FileNotFoundError):
        return ChecksumError(f"{path}: is missing. {_COPY_AGAIN}")
    return ChecksumError(f"{path}: cannot be read ({error}). {_COPY_AGAIN}")


class _Zip:
    def __init__(self, path: Path) -> None:
        # Here, since most bundles are folders and starting up should be quick.
        import lzma
        import zipfile
        import zlib

        self.path = path
        self._damage = (
            *(OSError, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError),
            *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
        )
        try:
            self._zip = zipfile.ZipFile(path)
        except self._damage as error:
            raise ManifestError(f"{path}: not a whole zip file ({error}). Give a bundle folder or its zip.") from None
        roots = [n.removesuffix(MANIFEST) for n in self._zip.namelist() if PurePosixPath(n).name == MANIFEST]
        if not roots:
            raise ManifestError(f"{path}: has no {MANIFEST} in it. Zip a whole bundle folder.")
        self._root = min(roots, key=len)

    def name(self, file: str) -> str:
        return f"{self.path}!{self._root}{file}"

    def read(self, file: str, size: int | None) -> bytes:
        try:
            with self._zip.open(self._root + str(_safe(file))) as stream:
                return stream.read(_MANIFEST_LIMIT if size is None else size + 1)
        except KeyError:
            raise ChecksumError(f"{self.name(file)}: is missing. {_COPY_AGAIN}") from None
        except self._damage as error:
            raise ChecksumError(f"{self.name(file)}: cannot be read ({error}). {_COPY_AGAIN}") from None


def _safe(file: str) -> PurePosixPath:
    path = PurePosixPath(file)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in file or ":" in file or "\0" in file:
        raise ManifestError(f"{MANIFEST}: {file!r} is not a path inside the bundle. {_COPY_AGAIN}")
    return path


class _Table:
    """A JSON object with checked access; errors name the file and the key."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ManifestError(f"{where}: must be a JSON object. {_COPY_AGAIN}")
        self.values: dict[str, Any] = values
        self.where = where

    def _get(self, key: str, kind: type | tuple[type, ...], what: str) -> Any:
        value = self.values.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ManifestError(f"{self.where}: {key!r} must be {what}. {_COPY_AGAIN}")
        return value

    def string(self, key: str) -> str:
        return str(self._get(key, str, "a string"))

    def boolean(self, key: str) -> bool:
        return bool(self._get(key, bool, "true or false"))

    def integer(self, key: str, minimum: int = 0) -> int:
        value = self._get(key, int, "an integer")
        if value < minimum:
            raise ManifestError(f"{self.where}: {key!r} must be at least {minimum}. {_COPY_AGAIN}")
        if value >= 2**40:
            raise ManifestError(f"{self.where}: {key!r} is absurdly large. {_COPY_AGAIN}")
        return int(value)

    def number(self, key: str) -> float:
        value = self._get(key, (int, float), "a number")
        if not -1e9 < value < 1e9:  # NaN compares false
            raise ManifestError(f"{self.where}: {key!r} must be finite. {_COPY_AGAIN}")
        return float(value)

    def items(self, key: str) -> list[Any]:
        value: list[Any] = self._get(key, list, "a list")
        return value

    def table(self, key: str) -> _Table:
        return _Table(self._get(key, dict, "an object"), f"{self.where}: {key}")

    def tables(self, key: str) -> list[_Table]:
        return [_Table(value, f"{self.where}: {key}[{i}]") for i, value in enumerate(self.items(key))]


def _file(table: _Table) -> File:
    file = File(table.string("file"), table.integer("bytes"), table.string("sha256"))
    _safe(file.file)
    return file


def _variant(table: _Table) -> Variant:
    calibration = table.table("calibration")
    return Variant(
        id=table.string("id"),
        runtime=table.string("runtime"),
        model=_file(table),
        weights=None if table.values.get("weights") is None else _file(table.table("weights")),
        precision=table.string("precision"),
        minimum_cosine=table.number("minimum_cosine"),
        calibration={
            kind: {strategy: _calibration(calibration.table(kind).table(strategy)) for strategy in by_strategy}
            for kind, by_strategy in calibration.values.items()
        },
        calibrated_on=table.string("calibrated_on") if table.values.get("calibrated_on") is not None else None,
        parity={key: table.table("parity").number(key) for key in table.table("parity").values},
        lengths=_lengths(table),
        package=None if table.values.get("package") is None else _file(table.table("package")),
        compute_units=None if table.values.get("compute_units") is None else table.string("compute_units"),
        minimum_os=None if table.values.get("minimum_os") is None else table.string("minimum_os"),
        padding_id=None if table.values.get("padding_id") is None else table.integer("padding_id"),
    )


def _lengths(table: _Table) -> tuple[int, ...]:
    """The tokens of a variant's fixed (batch, tokens) shapes."""
    shapes = table.items("shapes") if table.values.get("shapes") is not None else []
    fits = all(isinstance(s, list) and len(s) == 2 and all(type(n) is int and n > 0 for n in s) for s in shapes)
    if not fits:
        raise ManifestError(f"{table.where}: 'shapes' must be pairs of whole numbers. {_COPY_AGAIN}")
    return tuple(sorted(tokens for _, tokens in shapes))


def _generator(table: _Table) -> Generator:
    end_ids = table.items("end_ids")
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in end_ids):
        raise ManifestError(f"{table.where}: 'end_ids' must be integers. {_COPY_AGAIN}")
    return Generator(
        id=table.string("id"),
        model=_file(table.table("model")),
        weights=_file(table.table("weights")),
        precision=table.string("precision"),
        layers=table.integer("layers", 1),
        kv_heads=table.integer("kv_heads", 1),
        head_dim=table.integer("head_dim", 1),
        end_ids=tuple(end_ids),
        prompt=table.string("prompt"),
        prior=table.number("prior"),
        calibration=_calibration(table.table("calibration")),
        calibrated_on=table.string("calibrated_on") if table.values.get("calibrated_on") is not None else None,
    )


def _calibration(table: _Table) -> Calibration:
    rest = None if table.values.get("out_of_scope", 0) is None else table.number("out_of_scope")
    return Calibration(
        table.number("cosine"), table.number("matched"), table.number("first"), rest, table.number("threshold")
    )


def _matrix(values: list[Any], shape: tuple[int, ...], where: str, unit: bool = True) -> NDArray[np.float32]:
    try:
        matrix = np.asarray(values, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        matrix = np.empty(0, dtype=np.float32)
    fits = matrix.size > 0 and matrix.shape == shape and bool(np.isfinite(matrix).all())
    if not fits or (unit and not (np.abs(np.linalg.norm(matrix, axis=-1) - 1) < 1e-3).all()):
        length = "of unit length and " if unit else ""
        raise ManifestError(f"{where}: vectors must be finite, {length}of shape {shape}. {_COPY_AGAIN}")
    return matrix


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not valid JSON ({error}). {_COPY_AGAIN}") from None
