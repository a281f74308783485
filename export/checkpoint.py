"""Checkpoints: a Hugging Face or sentence-transformers folder or a GGUF file, checked before it is used."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers
from torch import nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM
from transformers.modeling_utils import no_init_weights

from export.backbones import ARCHITECTURES, Architecture, Backbone, is_causal
from export.errors import CheckpointError
from export.gguf import GgufFile, load_network, pooling_of
from export.gguf_tokenizer import tokenizer_of
from export.wrapper import POOLING, SentenceEncoder

DECODER_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear head; its scores are on the scale of cosines. The last row is out of scope."""

    weight: torch.Tensor  # (agents + 1, dim)
    bias: torch.Tensor  # (agents + 1,)


@dataclass(frozen=True, slots=True)
class Head:
    """Trained prototypes, one or several per agent: unit fp32 vectors in the embedding space.

    ``out_of_scope`` stands for tasks that are no software work at all. ``linear`` decides in the
    prototypes' stead where there is one.
    """

    agents: tuple[str, ...]
    prototypes: torch.Tensor  # (agents, prototypes an agent, dim)
    out_of_scope: torch.Tensor  # (dim,)
    linear: Linear | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An encoder as it was trained: backbone, tokenizer, and how tokens become one vector.

    Attributes:
        folder: The folder, or the GGUF file.
        backbone: The network up to the hidden states.
        tokenizer: Adds what belongs at the ends of a text; cuts and pads nothing.
        max_length: Longest text in tokens.
        head: Trained prototypes, if there are any.
        pooling: How the tokens' states become one vector; see ``export.wrapper.POOLING``.
        dense: What the pooled vector goes through, before it is normalised.
        prompt: Put before every text.
        language_model: The causal language model whose part the backbone is, if the checkpoint is one.
    """

    folder: Path
    backbone: Backbone
    tokenizer: Tokenizer
    max_length: int
    head: Head | None
    pooling: tuple[str, ...] = ("mean",)
    dense: tuple[nn.Module, ...] = ()
    prompt: str = ""
    language_model: Backbone | None = None

    @property
    def dim(self) -> int:
        """Number of values of an embedding."""
        return self.encoder().dim

    @property
    def padding(self) -> int:
        """Id of padding; 0 where the configuration states none that the embedding has."""
        stated = getattr(self.backbone.config, "pad_token_id", None)
        return int(stated) if stated is not None and 0 <= stated < self.backbone.config.vocab_size else 0

    def encoder(self) -> SentenceEncoder:
        """The network from token ids to unit vectors; it shares the checkpoint's weights."""
        return SentenceEncoder(self.backbone, self.pooling, self.dense)

    def tokenize(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        """Token ids of texts, prompt included, cut to ``limit`` (None: the checkpoint's maximum length).

        A text without a token, which tokenizers without special tokens can make, becomes id 0.

        Raises:
            CheckpointError: The tokenizer cannot take a text apart, or not within the limit.
        """
        try:
            self.tokenizer.enable_truncation(self.max_length if limit is None else limit)
            rows = self.tokenizer.encode_batch([self.prompt + text for text in texts])
            return [row.ids or [0] for row in rows]
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(
                f"{self.folder}: the tokenizer fails ({error}). Use the tokenizer that belongs to these weights."
            ) from None
        finally:
            self.tokenizer.no_truncation()


def load_checkpoint(
    source: str | Path,
    *,
    pooling: str | None = None,
    max_length: int | None = None,
    longest: int = DECODER_LENGTH,
    quiet: bool = True,
) -> Checkpoint:
    """Load a checkpoint in fp32: a Hugging Face or sentence-transformers folder, or a GGUF file.

    ``modules.json`` (sentence-transformers) is honoured where it exists. Without it, encoders are
    pooled by the mean and causal decoders by the last token, unless the file says otherwise. Only
    safetensors and GGUF are read: nothing is unpickled, and no code of a checkpoint is run.

    A decoder's memory grows with a text's length, so that its own limit is not always of use.

    Args:
        source: Folder or file.
        pooling: One of ``export.wrapper.POOLING``, where the checkpoint states none.
        max_length: A limit on tokens, at most the checkpoint's.
        longest: Causal decoders are limited to so many unless ``max_length`` asks for more.
        quiet: No progress bar while the tensors of a GGUF file are read.

    Raises:
        CheckpointError: A file is missing or broken, weights and config disagree, or the model is
            of a kind that is not supported.
    """
    source = Path(source)
    if pooling is not None and pooling not in POOLING:
        raise CheckpointError(f"unknown pooling {pooling!r}. Use one of: {', '.join(POOLING)}.")
    if source.is_file():
        checkpoint = _load_gguf(source, pooling, quiet)
    elif source.is_dir():
        checkpoint = _load_folder(source, pooling)
    elif len(source.parts) == 2 and not source.parts[0].startswith((".", "/", "~")):
        checkpoint = _load_folder(_from_hub(str(source)), pooling)
    else:
        raise CheckpointError(
            f"{source}: no such folder or file. Give a Hugging Face folder, a GGUF file or a hub id (owner/name)."
        )
    size = max(checkpoint.tokenizer.get_vocab().values(), default=-1) + 1
    rows = int(checkpoint.backbone.config.vocab_size)
    if size > rows:
        raise CheckpointError(
            f"{source}: the tokenizer has ids up to {size - 1}, the embedding only {rows} rows. Use the tokenizer that "
            "belongs to these weights."
        )
    if max_length is not None:
        if not 3 <= max_length <= checkpoint.max_length:
            raise CheckpointError(
                f"{source}: a maximum length of {max_length} tokens was asked for; choose from 3 to "
                f"{checkpoint.max_length}."
            )
        checkpoint = replace(checkpoint, max_length=max_length)
    elif is_causal(checkpoint.backbone):
        checkpoint = replace(checkpoint, max_length=min(checkpoint.max_length, longest))
    return checkpoint


def _from_hub(name: str) -> Path:
    """The folder of a hub's snapshot, fetched where it is not cached; pickled weights are not fetched."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["onnx/*", "openvino/*"]))
    except Exception as error:  # the hub's own errors, and those of each layer of the network below it
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{name}: there is no such folder, and the hub did not give a model of this name "
            f"({reason[0] if reason else type(error).__name__}). Check the name and the network, or give a folder."
        ) from None


def _load_gguf(path: Path, pooling: str | None, quiet: bool) -> Checkpoint:
    with GgufFile(path) as file:
        tokenizer = tokenizer_of(file)
        stated = pooling_of(file)
        if stated is not None and pooling is not None and stated != pooling:
            raise CheckpointError(f"{path}: states the pooling {stated!r}. Leave --pooling out.")
        network = load_network(file, "" if quiet else f"load {path.name}")
    causal = is_causal(network)
    return Checkpoint(
        path,
        network.model if causal else network,
        tokenizer,
        int(network.config.max_position_embeddings),
        None,
        pooling=(stated or pooling or ("lasttoken" if causal else "mean"),),
        language_model=network if causal else None,
    )


def _load_folder(folder: Path, pooling: str | None) -> Checkpoint:
    modules = _read_modules(folder)
    if modules.pooling is not None and pooling is not None and modules.pooling != (pooling,):
        raise CheckpointError(f"{folder}: modules.json states the pooling {modules.pooling}. Leave --pooling out.")
    inner = folder / modules.transformer
    config_path, weights_path = inner / "config.json", inner / "model.safetensors"
    config_values = _object(config_path)
    kind = str(config_values.get("model_type"))
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{inner}: model_type {kind!r} is not supported, only {', '.join(ARCHITECTURES)}. Use a model of one of "
            "these."
        )
    if "auto_map" in config_values:
        raise CheckpointError(
            f"{inner}: needs code of its own (auto_map in config.json), which is never run. Use a model that "
            "transformers knows."
        )
    architecture = ARCHITECTURES[kind]
    weights = _weights(inner)
    weights = {name.removeprefix(architecture.prefix): value for name, value in weights.items()}
    config = _config(architecture, config_values, config_path, weights)
    with _making(config_path), torch.device("meta"), no_init_weights():  # shapes alone: sizes may be absurd
        expected = {name: value.shape for name, value in architecture.make(config).state_dict().items()}
    missing = sorted(set(expected) - set(weights))
    wrong = sorted(name for name in set(expected) & set(weights) if expected[name] != weights[name].shape)
    if missing or wrong:
        raise CheckpointError(
            f"{weights_path}: does not fit config.json; missing tensors {missing[:3]}, wrong shapes {wrong[:3]}. "
            "Use the config.json that belongs to these weights."
        )
    with _making(config_path), no_init_weights():
        backbone = architecture.make(config)
    unfit = [name for name in expected if not weights[name].isfinite().all()]
    if unfit:
        raise CheckpointError(
            f"{weights_path}: the tensor {unfit[0]!r} holds values that are not finite. Copy it again."
        )
    backbone.load_state_dict({name: weights[name] for name in expected}, assign=True)
    backbone.eval()
    pooling_modes = modules.pooling or (pooling or ("lasttoken" if architecture.causal else "mean"),)
    _check_chain(folder, int(config.hidden_size) * len(pooling_modes), modules.dense)
    language_model = _language_model(backbone, weights, weights_path) if architecture.causal else None
    positions = int(config.max_position_embeddings) - architecture.reserved
    limit = modules.max_length or min(
        _whole(inner / "tokenizer_config.json", "model_max_length") or positions, positions
    )
    if limit > positions:
        raise CheckpointError(f"{folder}: max_seq_length {limit} exceeds the model's {positions} positions. Lower it.")
    tokenizer = _tokenizer(inner if (inner / "tokenizer.json").exists() else folder)
    if modules.lower_case:
        lower = normalizers.Lowercase()
        before = tokenizer.normalizer
        tokenizer.normalizer = lower if before is None else normalizers.Sequence([lower, before])
    checkpoint = Checkpoint(
        folder,
        backbone,
        tokenizer,
        limit,
        None,
        pooling=pooling_modes,
        dense=modules.dense,
        prompt=modules.prompt,
        language_model=language_model,
    )
    return replace(checkpoint, head=_load_head(folder, checkpoint.dim))


@contextlib.contextmanager
def _making(path: Path) -> Iterator[None]:
    """Say which config.json transformers could make nothing of, whatever it raises."""
    try:
        yield
    except Exception as error:  # ValueError, TypeError, KeyError, RuntimeError and errors of huggingface_hub's own
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: transformers makes no network of it ({type(error).__name__}: {reason}). Use the config.json that "
            "belongs to these weights."
        ) from None


def _config(architecture: Architecture, values: dict[str, Any], path: Path, weights: dict[str, torch.Tensor]) -> Any:
    """The configuration, where a network of it can become one graph."""
    with _making(path):
        config = architecture.config(values)
        layers = int(config.num_hidden_layers)
        positions = int(config.max_position_embeddings) - architecture.reserved
        scaling = (getattr(config, "rope_scaling", None) or {}).get("rope_type", "default")
    if not 0 < layers <= len(weights) or positions < 1:
        raise CheckpointError(
            f"{path}: {layers} layers and {positions} positions do not fit {len(weights)} tensors of weights. Use the "
            "config.json that belongs to these weights."
        )
    if getattr(config, "use_sliding_window", False):
        raise CheckpointError(f"{path}: attention within a sliding window is not supported. Use another model.")
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise CheckpointError(f"{path}: relative positions are not supported. Use another model.")
    if scaling in ("dynamic", "longrope"):
        raise CheckpointError(
            f"{path}: rotary embeddings scaled by the text's length ({scaling}) do not fit into one graph. Use "
            "another model."
        )
    return config


def _language_model(backbone: Backbone, weights: dict[str, torch.Tensor], path: Path) -> Backbone | None:
    """The causal language model around a decoder; None where there is no output layer.

    The output layer is the embedding's where the two are tied.
    """
    config = backbone.config
    embedding = backbone.embed_tokens.weight
    head = embedding if config.tie_word_embeddings else weights.get("lm_head.weight")
    if head is None:
        return None
    if head.shape != embedding.shape or not head.isfinite().all():
        raise CheckpointError(
            f"{path}: lm_head.weight has the shape {tuple(head.shape)} where {tuple(embedding.shape)} is wanted, or "
            "values that are not finite. Copy it again."
        )
    with no_init_weights():
        network = (LlamaForCausalLM if config.model_type == "llama" else Qwen2ForCausalLM)(config)
    network.model = backbone
    network.lm_head.weight = head if head is embedding else nn.Parameter(head)
    network.eval()  # type: ignore[no-untyped-call]
    return network


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors, in fp32, from one file or several."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not path.is_file() and index.is_file():
        listed = _object(index).get("weight_map")
        names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index}: names no files of this folder. Copy it again.")
        paths = [folder / name for name in names]
    else:
        paths = [path]
    weights: dict[str, torch.Tensor] = {}
    for part in paths:
        if not part.is_file():
            hint = "convert pytorch_model.bin with transformers' save_pretrained(safe_serialization=True); "
            hint = hint if (folder / "pytorch_model.bin").exists() else ""
            raise CheckpointError(f"{part}: missing. {hint}pickled weights are never read.".replace(". p", ". P", 1))
        try:
            with safe_open(part, framework="pt") as stream:  # one tensor at a time: no second copy of the file
                weights |= {name: stream.get_tensor(name).float() for name in stream.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{part}: not a whole safetensors file ({error}). Copy it again.") from None
    return weights


def save_checkpoint(folder: Path, checkpoint: Checkpoint, head: Head) -> None:
    """Write weights in fp16 (half the bytes; cosine to fp32 above 0.99999), tokenizer, modules and head.

    A causal language model keeps its output layer, which is left out where it is the embedding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backbone, language_model = checkpoint.backbone, checkpoint.language_model
    state = backbone.state_dict()
    if language_model is not None:
        state = {f"model.{name}": value for name, value in state.items()}
        if not backbone.config.tie_word_embeddings:
            state["lm_head.weight"] = language_model.lm_head.weight
    state = {name: value.detach().half().contiguous() for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = backbone.config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "gradient_checkpointing"):
        config.pop(key, None)
    network = backbone if language_model is None else language_model
    config |= {"model_type": backbone.config.model_type, "architectures": [type(network).__name__]}
    config["torch_dtype"] = "float16"
    _write_json(folder / "config.json", config)
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": checkpoint.max_length, "do_lower_case": False})
    _write_modules(folder, checkpoint)
    tensors = {"prototypes": head.prototypes.contiguous(), "out_of_scope": head.out_of_scope.contiguous()}
    if head.linear is not None:
        tensors |= {"weight": head.linear.weight.contiguous(), "bias": head.linear.bias.contiguous()}
    save_file(
        tensors,
        folder / "head.safetensors",
        metadata={"agents": json.dumps(head.agents)},
    )


def _write_modules(folder: Path, checkpoint: Checkpoint) -> None:
    """modules.json with what it names, and the prompt, as sentence-transformers reads them."""
    modules = ["Transformer", "Pooling", *["Dense"] * len(checkpoint.dense), "Normalize"]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(modules) if i)]
    _write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(zip(modules, paths, strict=True))
        ],
    )
    for path in paths[1:-1]:
        (folder / path).mkdir(exist_ok=True)
    pooling: dict[str, Any] = {"word_embedding_dimension": int(checkpoint.backbone.config.hidden_size)}
    keyed = {key: True for key, mode in _POOLING_KEYS.items() if mode in checkpoint.pooling}
    # The older keys state no order; sentence-transformers 5.7 reads a list.
    ordered = [_POOLING_KEYS[key] for key in keyed] == list(checkpoint.pooling)
    pooling |= keyed if ordered else {"pooling_mode": list(checkpoint.pooling)}
    _write_json(folder / paths[1] / "config.json", pooling)
    for path, module in zip(paths[2:-1], checkpoint.dense, strict=True):
        linear, activation = module.children()
        assert isinstance(linear, nn.Linear)
        settings = {
            "in_features": linear.in_features,
            "out_features": linear.out_features,
            "bias": linear.bias is not None,
            "activation_function": f"{type(activation).__module__}.{type(activation).__name__}",
        }
        _write_json(folder / path / "config.json", settings)
        dense = {f"linear.{name}": value.half().contiguous() for name, value in linear.state_dict().items()}
        save_file(dense, folder / path / "model.safetensors", metadata={"format": "pt"})
    if checkpoint.prompt:
        prompts = {"prompts": {"default": checkpoint.prompt}, "default_prompt_name": "default"}
        _write_json(folder / "config_sentence_transformers.json", prompts)


def _load_head(folder: Path, dim: int) -> Head | None:
    path = folder / "head.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            agents = tuple(json.loads((stream.metadata() or {})["agents"]))
            prototypes, out_of_scope = stream.get_tensor("prototypes"), stream.get_tensor("out_of_scope")
            linear = None
            if "weight" in stream.keys():  # noqa: SIM118 (no mapping)
                linear = Linear(stream.get_tensor("weight"), stream.get_tensor("bias"))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a head file ({error}). Fine-tune again or delete it.") from None
    fits = prototypes.ndim == 3 and prototypes.shape[::2] == (len(agents), dim) and out_of_scope.shape == (dim,)
    if fits and linear is not None:
        fits = linear.weight.shape == (len(agents) + 1, dim) and linear.bias.shape == (len(agents) + 1,)
    if not fits:
        raise CheckpointError(f"{path}: tensors of shapes that do not fit the encoder. Fine-tune again.")
    return Head(agents, prototypes, out_of_scope, linear)


@dataclass(frozen=True, slots=True)
class _Modules:
    """What a sentence-transformers folder says beyond the network; the defaults are those of a plain folder."""

    transformer: str = ""  # sub-folder of the network
    pooling: tuple[str, ...] | None = None
    dense: tuple[nn.Module, ...] = ()
    prompt: str = ""
    max_length: int | None = None
    lower_case: bool = False


# How pooling modes were named before sentence-transformers 5.7, each with a key of its own.
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU)
}


def _read_modules(folder: Path) -> _Modules:
    """Read ``modules.json`` and what it names.

    Raises:
        CheckpointError: A module that is not known, or in a place where it is not understood.
    """
    path = folder / "modules.json"
    if not path.exists():
        return _Modules(
            max_length=_whole(folder / "sentence_bert_config.json", "max_seq_length"), lower_case=_lower_case(folder)
        )
    modules = _json(path)
    fits = isinstance(modules, list) and len(modules) > 0
    if not fits or not all(isinstance(m, dict) and "type" in m and "path" in m for m in modules):
        raise CheckpointError(f"{path}: not a list of modules. Copy it again.")
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Dense", "Normalize"})
    if unknown:
        raise CheckpointError(f"{path}: modules of kind {', '.join(unknown)} are not supported. Use another model.")
    between = kinds[2:-1] if kinds[-1] == "Normalize" else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or set(between) - {"Dense"}:
        raise CheckpointError(
            f"{path}: the order {', '.join(kinds)} is not supported, only Transformer, Pooling, any Dense, "
            "Normalize. Use another model."
        )
    inner = _inside(folder, modules[0]["path"])
    settings = _object(_inside(folder, modules[1]["path"]) / "config.json")
    prompt = _prompt(folder)
    if prompt and settings.get("include_prompt", True) is False:
        raise CheckpointError(f"{path}: pooling without the prompt is not supported. Use another model.")
    return _Modules(
        transformer=str(modules[0]["path"]),
        pooling=_pooling(settings, path),
        dense=tuple(_dense(_inside(folder, m["path"])) for m, k in zip(modules, kinds, strict=True) if k == "Dense"),
        prompt=prompt,
        max_length=_whole(inner / "sentence_bert_config.json", "max_seq_length")
        or _whole(folder / "sentence_bert_config.json", "max_seq_length"),
        lower_case=_lower_case(inner),
    )


def _inside(folder: Path, path: object) -> Path:
    """A sub-folder that modules.json names; never one outside."""
    result = folder / str(path)
    if not result.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}/modules.json: {str(path)!r} lies outside of the folder. Copy it again.")
    return result


def _pooling(settings: dict[str, Any], path: Path) -> tuple[str, ...]:
    stated = settings.get("pooling_mode")
    if stated is None:
        modes = [mode for key, mode in _POOLING_KEYS.items() if settings.get(key) is True]
    else:
        modes = stated if isinstance(stated, list) else [stated]
    if not modes or any(mode not in POOLING for mode in modes):
        raise CheckpointError(
            f"{path}: pooling {modes} is not supported, only {', '.join(POOLING)}. Use another model."
        )
    return tuple(modes)


def _dense(folder: Path) -> nn.Module:
    """A linear layer and its activation."""
    settings = _object(folder / "config.json")
    name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{folder}: activation {name!r} is not supported, only {', '.join(_ACTIVATIONS)}. Use another model."
        )
    if settings.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise CheckpointError(f"{folder}: a dense layer on single tokens is not supported. Use another model.")
    weights = {key.removeprefix("linear."): value for key, value in _weights(folder).items()}
    try:
        layer = nn.Linear(int(settings["in_features"]), int(settings["out_features"]), bool(settings.get("bias", True)))
        layer.load_state_dict(weights)
    except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: weights do not fit config.json ({error}). Copy it again.") from None
    if not all(value.isfinite().all() for value in weights.values()):
        raise CheckpointError(f"{folder}: weights that are not finite. Copy it again.")
    return nn.Sequential(layer, _ACTIVATIONS[name]()).eval()


def _check_chain(folder: Path, width: int, dense: Sequence[nn.Module]) -> None:
    """Raise CheckpointError unless each dense layer takes what the one before it gives."""
    for layer in dense:
        linear = next(layer.children())
        assert isinstance(linear, nn.Linear)
        if linear.in_features != width:
            raise CheckpointError(
                f"{folder}: a dense layer takes {linear.in_features} values, but gets {width}. Copy it again."
            )
        width = linear.out_features


def _prompt(folder: Path) -> str:
    """The prompt that sentence-transformers puts before texts unless told otherwise."""
    path = folder / "config_sentence_transformers.json"
    settings = _object(path) if path.exists() else {}
    name = settings.get("default_prompt_name")
    if name is None:
        return ""
    prompts = settings.get("prompts")
    prompt = prompts.get(str(name)) if isinstance(prompts, dict) else None
    if not isinstance(prompt, str):
        raise CheckpointError(f"{path}: the default prompt {name!r} is not among the prompts. Copy it again.")
    return prompt


def _whole(path: Path, key: str) -> int | None:
    """A whole number above 0 of a JSON file; None where file or key is absent."""
    value = _object(path).get(key) if path.exists() else None
    if value is None:
        return None
    # Tokenizers without a limit state an astronomical one, which JSON may hold as a float.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1 or value < 1:
        raise CheckpointError(f"{path}: {key} is {value!r}, not a whole number above 0. Correct it.")
    return int(value)


def _lower_case(folder: Path) -> bool:
    path = folder / "sentence_bert_config.json"
    return bool(_object(path).get("do_lower_case", False)) if path.exists() else False


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing. Save the fast tokenizer with save_pretrained().")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer ({error}). Copy it again.") from None
    # Length and padding are the runtime's business; files in the wild carry either.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing. Copy the whole folder again.") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Copy it again.") from None


def _object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    value = _json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object. Copy it again.")
    return value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=isinstance(value, dict)) + "\n", encoding="utf-8")
