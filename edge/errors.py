"""Every error that ruvltra-edge raises on purpose.

    EdgeError
    ├── BundleError            a bundle cannot be used
    │   ├── ManifestError      bundle.json is missing, broken or inconsistent
    │   ├── ChecksumError      a file is missing, changed, cut short or a link
    │   └── VersionError       the bundle needs another version of this package
    ├── BackendError           the model cannot run
    │   ├── ProviderUnavailable  the execution provider is not installed, or of no use here
    │   ├── PlacementError     parts of the graph would run elsewhere than asked for
    │   └── OutputError        the model returned something that is not a unit vector
    ├── StoreError             a saved index or a memory store cannot be used
    ├── AgentError             a file of agents is broken (names file and line)
    ├── InputError             a value or file handed in by the caller cannot be used
    └── MissingExtra           an optional dependency is missing (names the pip command)

Each message says what is wrong and ends with what to do about it. ``EdgeWarning`` is no error: something that was to
be used is not, and something else is.
"""


class EdgeError(Exception):
    """Base class of all errors of this package."""


class EdgeWarning(UserWarning):
    """A way to run the model was dropped, and the next one is used."""


class BundleError(EdgeError):
    """A bundle cannot be used."""


class ManifestError(BundleError):
    """``bundle.json`` is missing, is not valid JSON or contradicts itself."""


class ChecksumError(BundleError):
    """A file of the bundle is missing, has changed, was cut short or is a link."""


class VersionError(BundleError):
    """The bundle's format is not one that this version reads."""


class BackendError(EdgeError):
    """The model cannot be loaded or run."""


class ProviderUnavailable(BackendError):
    """The asked-for execution provider is not part of the installed ONNX Runtime."""


class PlacementError(BackendError):
    """``strict=True``, and not all of the graph runs on the provider asked for."""


class OutputError(BackendError):
    """The model returned values that are not finite unit vectors."""


class StoreError(EdgeError):
    """A saved index or a memory store is missing, inconsistent, or made by another encoder."""


class AgentError(EdgeError):
    """A file or folder of agents cannot be read; the message names file and line."""


class InputError(EdgeError):
    """A value or a file handed in by the caller cannot be used."""


class MissingExtra(EdgeError):
    """An optional dependency is missing; the message is the exact pip command."""

    def __init__(self, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs an optional dependency. Run: pip install 'ruvltra-edge[{extra}]'")
