"""What can run a graph here: execution providers and back ends that are installed, and the candidates they make."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import onnxruntime as ort

from edge.errors import ProviderUnavailable

if TYPE_CHECKING:
    from edge.session import Backend

CPU = "CPUExecutionProvider"
BACKENDS = "ruvltra_edge.backends"  # group of entry points: back ends that other packages bring
LENGTHS = (16, 32, 64, 128, 256, 512)  # tokens, for providers that compile one graph a shape

# Packages with plug-in providers, and the modules that know where the library is.
PLUGINS = {
    "onnxruntime-ep-openvino": "onnxruntime_ep_openvino",
    "onnxruntime-ep-webgpu": "onnxruntime_ep_webgpu",
    "onnxruntime-ep-mlx": "onnxruntime_ep_mlx",
    "onnxruntime-ep-nv-tensorrt-rtx": "onnxruntime_ep_nv_tensorrt_rtx",
    "onnxruntime-qnn": "onnxruntime_qnn",
}
_registered: set[str] = set()  # packages; ONNX Runtime keeps their libraries for the process, too


class Known(NamedTuple):
    """An execution provider of ONNX Runtime, and how a small transformer runs on it.

    Attributes:
        provider: ONNX Runtime's name.
        options: For a provider that is built in; ``{cache}`` stands for a folder that is kept.
        static: It compiles one graph a shape, so that texts are padded to the next of ``LENGTHS``.
        plugin_options: For the provider as a plug-in, whose options differ.
    """

    provider: str
    options: Mapping[str, str] = {}
    static: bool = False
    plugin_options: Mapping[str, str] = {}


# By the names that ``device=`` takes. Only CPU and OpenVINO were run by us; the others' options are those that ONNX
# Runtime documents for networks like these.
KNOWN: dict[str, Known] = {
    "cpu": Known(CPU),
    "coreml": Known(
        "CoreMLExecutionProvider",
        {
            "ModelFormat": "MLProgram",
            "MLComputeUnits": "ALL",
            "RequireStaticInputShapes": "1",
            "ModelCacheDirectory": "{cache}",
        },
        static=True,
    ),
    "cuda": Known("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}),
    "tensorrt": Known(
        "TensorrtExecutionProvider",
        {"trt_engine_cache_enable": "1", "trt_engine_cache_path": "{cache}", "trt_timing_cache_enable": "1"},
        static=True,
    ),
    "tensorrt-rtx": Known("NvTensorRTRTXExecutionProvider", static=True),
    "directml": Known("DmlExecutionProvider"),
    "openvino": Known("OpenVINOExecutionProvider", {"device_type": "CPU", "precision": "FP32"}),
    "qnn": Known(
        "QNNExecutionProvider",
        {"backend_type": "htp", "htp_performance_mode": "burst"},
        static=True,
        plugin_options={"backend_type": "htp", "htp_performance_mode": "burst"},
    ),
    "webgpu": Known("WebGpuExecutionProvider"),
    "mlx": Known("MLXExecutionProvider"),
    "xnnpack": Known("XnnpackExecutionProvider", static=True),
    "rocm": Known("ROCMExecutionProvider"),
    "migraphx": Known("MIGraphXExecutionProvider", static=True),
    "acl": Known("ACLExecutionProvider", {"enable_fast_math": "true"}),
}
_UNUSED = {"AzureExecutionProvider": "calls a service over the network, which this package never does"}


class Provider(NamedTuple):
    """What ``device=`` may be, where a name alone does not say enough.

    Attributes:
        name: A name of ``KNOWN``, ONNX Runtime's name of a provider, or that of a back end which another package
            brings.
        options: The provider's own options, in place of the known ones.
    """

    name: str
    options: Mapping[str, str] | None = None


class Installed(NamedTuple):
    """A provider or back end that is installed.

    Attributes:
        name: Of ``KNOWN`` if it is there, else ONNX Runtime's or the package's own.
        source: ``built in``, ``plug-in PACKAGE VERSION`` or ``back end of PACKAGE VERSION``.
        hardware: What it found to run on; empty where it does not say.
        unusable: Why it is of no use here; None where it can be tried.
        package: The plug-in's package; None for others.
    """

    name: str
    source: str
    hardware: tuple[str, ...] = ()
    unusable: str | None = None
    package: str | None = None


class Candidate(NamedTuple):
    """One way to run a bundle here.

    Attributes:
        variant: Id of a variant.
        provider: As in :class:`Installed`.
        options: The provider's options.
        hardware: Kind of hardware that a plug-in shall use, ``CPU``, ``GPU`` or ``NPU``; empty for its first.
        threads: Threads for one text, where the provider lets itself be told.
        spinning: Whether threads wait for their next share of work by spinning.
    """

    variant: str
    provider: str = "cpu"
    options: Mapping[str, str] = {}
    hardware: str = ""
    threads: int = 1
    spinning: bool = False

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}{', spinning' if self.spinning else ''}"
        return f"{self.variant} on {self.provider}{f' ({self.hardware})' if self.hardware else ''}, {threads}"


def installed() -> tuple[Installed, ...]:
    """All providers and back ends, CPU last. Loads plug-ins, which takes some tenths of a second each."""
    from importlib import metadata  # here and below: slow to import, and the default needs none of it

    short = {known.provider: name for name, known in KNOWN.items()}
    found = [
        Installed(short.get(name, name), "built in", unusable=_UNUSED.get(name))
        for name in ort.get_available_providers()
        # Once registered, ONNX Runtime lists plug-ins as well, and what chooses among their hardware ("X.AUTO").
        if name != CPU and plugin_package(name.partition(".")[0]) is None
    ]
    for package, module in PLUGINS.items():
        if importlib.util.find_spec(module) is not None:
            found += _plugin(package, short)
    for point in metadata.entry_points(group=BACKENDS):
        owner = "a package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
        found.append(Installed(point.name, f"back end of {owner}"))
    return (*found, Installed("cpu", "built in"))


def _plugin(package: str, short: Mapping[str, str]) -> list[Installed]:
    source = f"plug-in {package} {_version(package)}"
    names = _names(package)
    try:
        register(package)
    except ProviderUnavailable as error:
        return [Installed(short.get(name, name), source, unusable=str(error), package=package) for name in names]
    rows = []
    for name in names:
        hardware = tuple(_hardware(device) for device in ort.get_ep_devices() if device.ep_name == name)
        why = None if hardware else "finds no hardware here that it can use"
        rows.append(Installed(short.get(name, name), source, hardware, why, package))
    return rows


def _names(package: str) -> list[str]:
    module = importlib.import_module(PLUGINS[package])
    return list(module.get_ep_names() if hasattr(module, "get_ep_names") else [module.get_ep_name()])


def _hardware(device: ort.OrtEpDevice) -> str:
    return f"{_kind(device)} {device.ep_metadata.get('FULL_DEVICE_NAME') or device.device.vendor}".strip()


def hardware_of(provider: str, kind: str) -> list[ort.OrtEpDevice]:
    """What a registered plug-in runs on: its first hardware of a kind.

    Raises:
        ProviderUnavailable: There is none.
    """
    found = [d for d in ort.get_ep_devices() if d.ep_name == provider]
    fitting = [d for d in found if not kind or _kind(d) == kind]
    if not fitting:
        kinds = ", ".join(sorted({_kind(d) for d in found})) or "nothing"
        raise ProviderUnavailable(f"{provider} finds no {kind or 'hardware'} here, but {kinds}. Use another device.")
    return fitting[:1]


def _kind(device: ort.OrtEpDevice) -> str:
    return str(device.device.type).rpartition(".")[2]


def register(package: str) -> None:
    """Have ONNX Runtime load a plug-in's library, once in a process.

    Raises:
        ProviderUnavailable: ONNX Runtime cannot load it.
    """
    if package in _registered:
        return
    try:
        library = str(importlib.import_module(PLUGINS[package]).get_library_path())
        ort.register_execution_provider_library(package, library)
    except Exception as error:  # of ONNX Runtime's own kinds, or whatever the package raises
        raise ProviderUnavailable(
            f"{package}: ONNX Runtime {ort.__version__} cannot load it ({first_line(error)}). Install a version made "
            "for this ONNX Runtime."
        ) from None
    _registered.add(package)


def find(name: str, among: Sequence[Installed]) -> Installed:
    """An installed provider by its name, or by ONNX Runtime's.

    Raises:
        ProviderUnavailable: There is none of this name, or it is not installed here, or of no use here.
    """
    short = next((known for known in KNOWN if KNOWN[known].provider == name), name)
    rows = [row for row in among if row.name == short]
    usable = [row for row in rows if row.unusable is None]
    if usable:
        return usable[0]
    have = ", ".join(row.name for row in among if row.unusable is None)
    if rows:
        raise ProviderUnavailable(
            f"{short} ({rows[0].source}) {rows[0].unusable}. Use another of: auto, {have}; ruvltra device says what "
            "there is."
        )
    if short not in KNOWN:
        raise ProviderUnavailable(
            f"device {name!r} is not available, nor known. Use one of: auto, {have}; with a package that has it, one "
            f"of: {', '.join(KNOWN)}."
        )
    raise ProviderUnavailable(
        f"{KNOWN[short].provider} is not part of the installed ONNX Runtime {ort.__version__}. Install a package that "
        f"has it, or use one of: auto, {have}."
    )


def options_of(row: Installed, cache: str) -> dict[str, str]:
    """What a known provider is best told; nothing to others."""
    known = KNOWN.get(row.name)
    if known is None:
        return {}
    options = known.options if row.package is None else known.plugin_options
    if "{cache}" in options.values():
        with contextlib.suppress(OSError):  # the provider then says so
            Path(cache).mkdir(parents=True, exist_ok=True)
    return {key: value.replace("{cache}", cache) for key, value in options.items()}


def backend_factory(name: str) -> Callable[..., Backend] | None:
    """What makes the back end of this name, if an installed package brings it; called as ``OnnxBackend`` is."""
    from importlib import metadata

    for point in metadata.entry_points(group=BACKENDS, name=name):
        factory: Callable[..., Backend] = point.load()
        return factory
    return None


def plugin_package(provider: str) -> str | None:
    """The installed package whose plug-in has the provider of this name of ONNX Runtime; None if there is none."""
    for package, module in PLUGINS.items():
        if importlib.util.find_spec(module) is not None and provider in _names(package):
            return package
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut where ONNX Runtime spells out its C++ types."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"
