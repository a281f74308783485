"""Checkpoints: a Hugging Face or sentence-transformers folder, checked before it is used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

from export.errors import CheckpointError


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
    """An encoder as it was trained: backbone, tokenizer, and how tokens become one vector."""

    folder: Path
    backbone: BertModel | MPNetModel
    tokenizer: Tokenizer
    max_length: int
    head: Head | None

    @property
    def dim(self) -> int:
        """Number of values of an embedding."""
        return int(self.backbone.config.hidden_size)

    def tokenize(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        """Token ids of texts, cut to ``limit`` (None: the checkpoint's maximum length)."""
        self.tokenizer.enable_truncation(self.max_length if limit is None else limit)
        try:
            return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        finally:
            self.tokenizer.no_truncation()


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Load a BERT or MPNet checkpoint in fp32.

    ``modules.json`` (sentence-transformers) is honoured where it exists: mean pooling and
    normalisation are what this version exports, anything else is refused. A plain Hugging Face
    folder is pooled by the mean. Only ``model.safetensors`` is read: nothing is unpickled.

    Raises:
        CheckpointError: A file is missing or broken, weights and config disagree, or the model is
            of a kind that is not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give a Hugging Face or sentence-transformers folder.")
    config_values = _json(folder / "config.json")
    kind = config_values.get("model_type")
    if kind not in ("bert", "mpnet"):
        raise CheckpointError(
            f"{folder}: model_type {kind!r} is not supported. Use an encoder of type 'bert' or 'mpnet' "
            "(all-MiniLM-L6-v2 or all-mpnet-base-v2, for example)."
        )
    positions = int(config_values.get("max_position_embeddings", 512))
    # MPNet numbers its positions from 2 on, as RoBERTa does.
    max_length = _check_modules(folder, positions if kind == "bert" else positions - 2)
    weights_path = folder / "model.safetensors"
    if not weights_path.is_file():
        hint = "convert pytorch_model.bin with transformers' save_pretrained(safe_serialization=True); "
        hint = hint if (folder / "pytorch_model.bin").exists() else ""
        raise CheckpointError(
            f"{weights_path}: missing. {hint}pickled weights are never read.".replace(". p", ". P", 1)
        )
    try:
        weights = {name: value.float() for name, value in load_file(weights_path).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights_path}: not a whole safetensors file ({error}). Copy it again.") from None
    config = (BertConfig if kind == "bert" else MPNetConfig).from_dict(config_values)
    # Eager attention takes the additive mask that the wrapper makes, in training and in export.
    config._attn_implementation = "eager"
    backbone = (BertModel if kind == "bert" else MPNetModel)(config, add_pooling_layer=False)
    weights = {name.removeprefix(f"{kind}."): value for name, value in weights.items()}
    expected = backbone.state_dict()
    missing = sorted(set(expected) - set(weights))
    wrong = sorted(name for name in set(expected) & set(weights) if expected[name].shape != weights[name].shape)
    if missing or wrong:
        raise CheckpointError(
            f"{weights_path}: does not fit config.json; missing tensors {missing[:3]}, wrong shapes {wrong[:3]}. "
            "Use the config.json that belongs to these weights."
        )
    backbone.load_state_dict({name: weights[name] for name in expected})
    backbone.eval()  # type: ignore[no-untyped-call]
    tokenizer = _tokenizer(folder)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the embedding only "
            f"{config.vocab_size}. Use the tokenizer that belongs to these weights."
        )
    return Checkpoint(folder, backbone, tokenizer, max_length, _load_head(folder, int(config.hidden_size)))


def save_checkpoint(folder: Path, checkpoint: Checkpoint, head: Head) -> None:
    """Write weights in fp16 (half the bytes; cosine to fp32 above 0.99999), tokenizer and head."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().half().contiguous() for name, value in checkpoint.backbone.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = checkpoint.backbone.config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "gradient_checkpointing"):
        config.pop(key, None)
    backbone = checkpoint.backbone
    config |= {"model_type": backbone.config.model_type, "architectures": [type(backbone).__name__]}
    config["torch_dtype"] = "float16"
    _write_json(folder / "config.json", config)
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": checkpoint.max_length, "do_lower_case": False})
    _write_json(
        folder / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": checkpoint.dim, "pooling_mode_mean_tokens": True}
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    tensors = {"prototypes": head.prototypes.contiguous(), "out_of_scope": head.out_of_scope.contiguous()}
    if head.linear is not None:
        tensors |= {"weight": head.linear.weight.contiguous(), "bias": head.linear.bias.contiguous()}
    save_file(
        tensors,
        folder / "head.safetensors",
        metadata={"agents": json.dumps(head.agents)},
    )


def _load_head(folder: Path, dim: int) -> Head | None:
    path = folder / "head.safetensors"
    if not path.exists():
        return None
    from safetensors import safe_open

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


def _check_modules(folder: Path, max_positions: int) -> int:
    """Maximum length in tokens, after checking that modules.json describes mean + normalise."""
    if (folder / "modules.json").exists():
        modules = _json(folder / "modules.json")
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise CheckpointError(
                f"{folder}/modules.json: {kinds} is not Transformer, Pooling, Normalize. Not supported."
            )
        pooling_path = folder / modules[1]["path"] / "config.json"
        pooling = _json(pooling_path)
        modes = [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v is True]
        # sentence-transformers names the mode since 5.7; before, each mode had a key of its own.
        modes = [pooling["pooling_mode"]] if "pooling_mode" in pooling else modes
        if modes not in (["pooling_mode_mean_tokens"], ["mean"], [["mean"]]):
            raise CheckpointError(f"{pooling_path}: pooling {modes} is not supported. Use mean pooling.")
    limit = None
    if (folder / "sentence_bert_config.json").exists():
        limit = _json(folder / "sentence_bert_config.json").get("max_seq_length")
    if limit is None and (folder / "tokenizer_config.json").exists():
        # Tokenizers without a limit state an astronomical one.
        limit = min(_json(folder / "tokenizer_config.json").get("model_max_length") or max_positions, max_positions)
    limit = max_positions if limit is None else int(limit)
    if not 0 < limit <= max_positions:
        raise CheckpointError(
            f"{folder}: max_seq_length {limit} exceeds the model's {max_positions} positions. Lower it."
        )
    return limit


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
        raise CheckpointError(f"{path}: missing. The checkpoint folder is not complete.") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Copy it again.") from None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=isinstance(value, dict)) + "\n", encoding="utf-8")
