from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint import Checkpoint, Head, load_checkpoint, save_checkpoint
from export.errors import CheckpointError
from export.wrapper import embed
from tests.export.conftest import MINILM


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(MINILM, folder, ignore=shutil.ignore_patterns("model.safetensors", "*.md", "data_config.json"))
    (folder / "model.safetensors").symlink_to(MINILM / "model.safetensors")
    return folder


def test_equals_sentence_transformers_pipeline(minilm: Checkpoint) -> None:
    """Against Hugging Face's own forward pass with the pooling of the model card."""
    from transformers import AutoModel

    reference = AutoModel.from_pretrained(MINILM).eval()
    texts = ["Fix the login", "a much longer text about the cache and the queue behind it"]
    rows = [minilm.tokenizer.encode(text).ids for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        hidden = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        expected = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)
        vectors = minilm.encoder()(ids, mask)
    assert float((vectors * expected).sum(1).min()) > 0.9999999
    assert minilm.max_length == 256
    assert minilm.head is None


def test_saving_in_half_precision_keeps_the_vectors(minilm: Checkpoint, tmp_path: Path) -> None:
    head = Head(("a", "b"), torch.eye(2, 384)[:, None], torch.eye(3, 384)[2])
    save_checkpoint(tmp_path / "saved", minilm, head)
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 50_000_000
    again = load_checkpoint(tmp_path / "saved")
    assert again.head is not None
    assert again.head.agents == ("a", "b")
    assert torch.equal(again.head.prototypes, head.prototypes)
    ids = torch.tensor([minilm.tokenizer.encode("Fix the null pointer in the login handler").ids])
    with torch.no_grad():
        a = minilm.encoder()(ids, torch.ones_like(ids))
        b = again.encoder()(ids, torch.ones_like(ids))
    assert float((a * b).sum()) > 0.99999


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(content | values))


def test_a_missing_folder_or_file_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(tmp_path / "nothing")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (copy / name).rename(tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(copy)
        (tmp_path / name).rename(copy / name)


def test_pickled_weights_are_never_read(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"safe_serialization=True.*never read"):
        load_checkpoint(copy)


def test_damaged_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    shutil.copyfile(MINILM / "model.safetensors", copy / "model.safetensors")
    os.truncate(copy / "model.safetensors", 1_000_000)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(copy)


def test_weights_that_do_not_fit_the_config_are_refused(copy: Path) -> None:
    weights = load_file(MINILM / "model.safetensors")
    removed = weights.pop("encoder.layer.3.output.dense.weight")
    (copy / "model.safetensors").unlink()
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing tensors \['encoder.layer.3.output.dense.weight'\]"):
        load_checkpoint(copy)
    weights["encoder.layer.3.output.dense.weight"] = removed.T.contiguous()
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="wrong shapes"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("config.json", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ("config.json", {"vocab_size": 30000}, "wrong shapes"),
        ("config.json", {"auto_map": {"AutoModel": "code.Model"}}, "needs code of its own"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, r"pooling \[\] is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, r"pooling \['median'\] is not supported"),
        ("sentence_bert_config.json", {"max_seq_length": 1024}, "exceeds the model's 512"),
    ],
)
def test_what_is_not_supported_is_refused(copy: Path, file: str, values: dict[str, object], words: str) -> None:
    change(copy / file, **values)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(copy)


def test_an_unknown_module_is_refused(copy: Path) -> None:
    modules = json.loads((copy / "modules.json").read_text())
    for kind, words in (("WordWeights", "modules of kind WordWeights are not supported"), ("Pooling", "the order")):
        more = {"idx": 2, "name": "2", "path": "2_More", "type": f"sentence_transformers.models.{kind}"}
        (copy / "modules.json").unlink()
        (copy / "modules.json").write_text(json.dumps([*modules[:2], more, *modules[2:]]))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(copy)


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"extra{i}": 30522 + i for i in range(10)}
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the tokenizer has 30532 tokens"):
        load_checkpoint(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load_checkpoint(copy)


def test_a_folder_as_sentence_transformers_5_7_saves_it(copy: Path) -> None:
    """It names the pooling mode by one key and leaves the length to the tokenizer's config."""
    for file, values in {
        "1_Pooling/config.json": {"embedding_dimension": 384, "pooling_mode": "mean", "include_prompt": True},
        "sentence_bert_config.json": {"transformer_task": "feature-extraction"},
        "tokenizer_config.json": {"model_max_length": 256},
    }.items():
        (copy / file).unlink()
        (copy / file).write_text(json.dumps(values))
    assert load_checkpoint(copy).max_length == 256
    change(copy / "1_Pooling" / "config.json", pooling_mode="cls")
    assert load_checkpoint(copy).pooling == ("cls",)
    with pytest.raises(CheckpointError, match="Leave --pooling out"):
        load_checkpoint(copy, pooling="mean")


@pytest.mark.parametrize("pooling", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "two"])
def test_equals_sentence_transformers(tmp_path: Path, pooling: str) -> None:
    """Every pooling mode, a dense layer, a default prompt and a maximum length, against the library itself."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    modes = ("mean", "cls") if pooling == "two" else pooling
    encoder = Transformer(str(MINILM), max_seq_length=24)
    pool = Pooling(384, pooling_mode=modes)
    torch.manual_seed(1)
    dense = Dense(384 * (2 if pooling == "two" else 1), 64, activation_function=torch.nn.Tanh())
    model = SentenceTransformer(
        modules=[encoder, pool, dense, Normalize()], prompts={"query": "search: "}, device="cpu"
    )
    model.default_prompt_name = "query"
    model.save(str(tmp_path / "saved"))
    checkpoint = load_checkpoint(tmp_path / "saved")
    assert (checkpoint.max_length, checkpoint.dim, checkpoint.prompt) == (24, 64, "search: ")
    texts = ["Fix the login", "word " * 60, "Ünïcode, \u4f60\u597d!"]
    vectors = embed(checkpoint.encoder(), checkpoint.tokenize(texts)).numpy()
    assert float((vectors * model.encode(texts)).sum(1).min()) > 0.999999
