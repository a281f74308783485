from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

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
    assert float((vectors.double() * expected.double()).sum(1).min()) > 0.999999
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
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length is 'long', not a whole number"),
        ("sentence_bert_config.json", {"max_seq_length": 2.5}, "max_seq_length is 2.5, not a whole number"),
        ("sentence_bert_config.json", {"max_seq_length": -1}, "max_seq_length is -1, not a whole number"),
        ("config.json", {"hidden_size": 12 * 10**6}, "wrong shapes"),
        ("config.json", {"hidden_size": None}, "transformers makes no network of it"),
        ("config.json", {"hidden_size": "wide"}, "transformers makes no network of it"),
        ("config.json", {"num_attention_heads": 7}, "transformers makes no network of it"),
        ("config.json", {"hidden_act": "sparkle"}, "transformers makes no network of it"),
        ("config.json", {"num_hidden_layers": 10**9}, "1000000000 layers"),
        ("config.json", {"max_position_embeddings": 0}, "0 positions"),
        ("config.json", {"position_embedding_type": "relative_key"}, "relative positions are not supported"),
    ],
)
def test_what_is_not_supported_is_refused(copy: Path, file: str, values: dict[str, object], words: str) -> None:
    change(copy / file, **values)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(copy)


@pytest.mark.parametrize("content", ["[]", "{}", "7", "null", '[{"type": "Transformer"}]', "[[]]", "{"])
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "tokenizer.json",
    ],
)
def test_json_of_another_form_is_refused_or_changes_nothing(copy: Path, file: str, content: str) -> None:
    (copy / file).unlink()
    (copy / file).write_text(content)
    try:
        load_checkpoint(copy)
    except CheckpointError as error:
        assert str(copy) in str(error)  # noqa: PT017 (most of them are refused, and none by another error)
    else:
        assert content == "{}"
        assert file in ("sentence_bert_config.json", "config_sentence_transformers.json")


def test_a_tokenizer_that_fails_on_a_text_is_named(copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "[NONE]"
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the tokenizer fails"):
        load_checkpoint(copy).tokenize(["\U0001f9ea"])


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
    with pytest.raises(CheckpointError, match="the tokenizer has ids up to 30531"):
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


def test_saving_keeps_pooling_dense_and_prompt(minilm: Checkpoint, tmp_path: Path) -> None:
    """As sentence-transformers reads them, too; several pooling modes in an order of their own included."""
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(2)
    dense = torch.nn.Sequential(torch.nn.Linear(768, 32), torch.nn.Tanh())
    head = Head(("a", "b"), torch.eye(2, 32)[:, None], torch.eye(3, 32)[2])
    for pooling in (("mean", "cls"), ("cls", "mean")):
        made = replace(minilm, pooling=pooling, dense=(dense,), prompt="query: ")
        folder = tmp_path / "-".join(pooling)
        save_checkpoint(folder, made, head)
        again = load_checkpoint(folder)
        assert (again.pooling, again.prompt, again.dim) == (pooling, "query: ", 32)
        texts = ["Fix the login", "word " * 60]
        vectors = embed(again.encoder(), again.tokenize(texts)).numpy()
        library = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)
        assert float((vectors * library).sum(1).min()) > 0.99999
    content = json.loads((folder / "2_Dense" / "config.json").read_text())
    for values, words in (
        ({"in_features": None}, "do not fit config.json"),
        ({"in_features": 384}, "do not fit config.json"),
        ({"activation_function": "torch.nn.Softsign"}, "'Softsign' is not supported"),
    ):
        (folder / "2_Dense" / "config.json").write_text(json.dumps(content | values))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(folder)
    (folder / "2_Dense" / "config.json").write_text(json.dumps(content))
    change(folder / "1_Pooling" / "config.json", pooling_mode=["cls"])
    with pytest.raises(CheckpointError, match="takes 768 values, but gets 384"):
        load_checkpoint(folder)


def test_an_output_layer_is_checked(tmp_path: Path) -> None:
    """A decoder without one embeds; one of another shape is an error rather than tied in silence."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    network = Qwen2ForCausalLM(config)
    network.save_pretrained(tmp_path)
    vocabulary = {chr(0x100 + i): i for i in range(300)}
    Tokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "tokenizer.json"))
    whole = load_checkpoint(tmp_path)
    assert whole.language_model is not None
    assert torch.equal(whole.language_model.lm_head.weight, network.lm_head.weight)
    weights = load_file(tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    save_file({name: value for name, value in weights.items() if name != "lm_head.weight"}, path)
    bare = load_checkpoint(tmp_path)
    assert bare.language_model is None
    assert bare.max_length == whole.max_length == 2048
    for wrong in (weights["lm_head.weight"][:7], weights["lm_head.weight"] * float("nan")):
        save_file(weights | {"lm_head.weight": wrong.contiguous()}, path)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            load_checkpoint(tmp_path)
