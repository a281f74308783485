"""GGUF files: small ones written by the gguf package, sound and damaged, against the networks they hold."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from edge import Bundle, Encoder, Router
from export.checkpoint import load_checkpoint
from export.cli import main
from export.errors import CheckpointError
from export.gguf import _BERT, _DECODER, _NOMIC, GgufFile, load_network, summary
from export.gguf_tokenizer import tokenizer_of
from export.nomic import NomicBert, NomicBertConfig
from export.parity import parity_texts
from tests.conftest import MINI

HIDDEN, INNER, LAYERS, HEADS = 64, 128, 2, 4
ODD = [
    *parity_texts("tasks"),
    *parity_texts("odd"),
    "  leading and   inner  spaces  ",
    "tabs\tand\nlines\r\n\r\n",
    "I'm you're WE'LL they'd",
    "12345 3.14 1,000",
    "e\u0301 cafe\u0301",
    "日本語 한국어 العربية ไทย",
    "👍🏽 👨‍👩‍👧‍👦",
    "<|end|> in the <|end|>middle",
    "for(i=0;i<n;++i){a[i]*=2;}",
    "x" * 300,
]


def byte_level() -> tuple[Tokenizer, list[str], list[str]]:
    """A trained byte-level BPE tokenizer as GPT-2 has it, its tokens and its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (MINI / "data" / "plain.jsonl").read_text("utf-8").splitlines()
    tokenizer.train_from_iterator([json.loads(line)["task"] for line in lines], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(merge) for merge in model["merges"]]
    return tokenizer, sorted(model["vocab"], key=model["vocab"].get), merges


def wordpiece() -> tuple[Tokenizer, list[str]]:
    """all-MiniLM's tokenizer and its tokens."""
    tokenizer = Tokenizer.from_file(str(MINI / "checkpoint" / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    return tokenizer, sorted(vocabulary, key=vocabulary.__getitem__)


def sizes(writer: GGUFWriter, positions: int = 64) -> None:
    writer.add_context_length(positions)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)


def tensors(
    writer: GGUFWriter,
    network: torch.nn.Module,
    names: dict[str, str],
    kind: GGMLQuantizationType,
    heads: dict[str, int],
) -> None:
    """Write a network's parameters by the names that llama.cpp gives them, rows permuted where it permutes them."""
    state = network.state_dict()
    for layer in range(LAYERS):
        for pattern, target in names.items():
            if layer and ".N." not in pattern:
                continue
            for part in ("weight", "bias"):
                values = state.get(f"{target.replace('.N.', f'.{layer}.')}.{part}")
                if values is None or (pattern == "output" and network.config.tie_word_embeddings):
                    continue
                array = values.numpy()
                count = heads.get(pattern.removeprefix("blk.N."))
                if count:
                    split = array.reshape(count, 2, -1, *array.shape[1:])
                    array = np.ascontiguousarray(split.swapaxes(1, 2).reshape(array.shape))
                matrix = array.ndim == 2
                name = f"{pattern.replace('.N.', f'.{layer}.')}.{part}"
                if not matrix or kind == GGMLQuantizationType.F32:
                    writer.add_tensor(name, array)
                else:
                    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(path: Path, architecture: str, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> torch.nn.Module:
    """A small model with random weights; returns the network that was written."""
    torch.manual_seed(6)
    writer = GGUFWriter(path, architecture)
    sizes(writer)
    common: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
    }
    network: Any
    if architecture in ("llama", "qwen2"):
        _, tokens, merges = byte_level()
        common |= {"num_key_value_heads": 2, "vocab_size": len(tokens), "rope_theta": 10000.0}
        if architecture == "llama":
            network = LlamaForCausalLM(LlamaConfig(**common))
        else:
            network = Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True))
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(network.config.rms_norm_eps)
        writer.add_rope_freq_base(10000.0)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token == "<|end|>" else 1 for token in tokens])
        writer.add_token_merges(merges)
        writer.add_eos_token_id(0)
        names, heads = _DECODER, {"attn_q": HEADS, "attn_k": 2} if architecture == "llama" else {}
    else:
        _, tokens = wordpiece()
        if architecture == "bert":
            config = BertConfig(**common, vocab_size=len(tokens), layer_norm_eps=1e-12)
            network, names = BertModel(config, add_pooling_layer=False), _BERT
        else:
            nomic = NomicBertConfig(len(tokens), HIDDEN, LAYERS, HEADS, INNER, 64, 1e-12, 1000.0)
            network, names = NomicBert(nomic), _NOMIC
            writer.add_rope_freq_base(1000.0)
        heads = {}
        writer.add_layer_norm_eps(1e-12)
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.MEAN)
        writer.add_tokenizer_model("bert")
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        marked = [t if t in special else t[2:] if t.startswith("##") else f"\u2581{t}" for t in tokens]
        writer.add_token_list(marked)
        writer.add_token_types([3 if token in special else 1 for token in tokens])
        for key, token in (("cls", "[CLS]"), ("seperator", "[SEP]"), ("unknown", "[UNK]"), ("padding", "[PAD]")):
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", tokens.index(token))
    tensors(writer, network.eval(), names, kind, heads)
    finish(writer)
    return network  # type: ignore[no-any-return]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "bert", "nomic-bert"])
@torch.no_grad()
def test_the_network_comes_back_bit_for_bit(tmp_path: Path, architecture: str) -> None:
    network = write(tmp_path / "model.gguf", architecture)
    found = load_network(GgufFile(tmp_path / "model.gguf")).state_dict()
    for name, values in network.state_dict().items():
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_are_what_the_gguf_package_says(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    network = write(path, "qwen2", GGMLQuantizationType[kind])
    file = GgufFile(path)
    name, matrix = "blk.1.ffn_up.weight", network.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    packed = gguf.quants.quantize(matrix, GGMLQuantizationType[kind])
    expected = gguf.quants.dequantize(packed, GGMLQuantizationType[kind])
    assert file.tensors[name].type.name == kind
    np.testing.assert_array_equal(file.read(name), expected)
    assert np.abs(file.read(name) - matrix).max() < 0.02


@pytest.mark.parametrize(("kind", "size"), [("Q4_K", 144), ("Q5_K", 176), ("Q6_K", 210), ("Q2_K", 84), ("Q3_K", 110)])
def test_k_quants_are_read_in_rows(tmp_path: Path, kind: str, size: int) -> None:
    """Blocks of 256 that nobody here can quantise: random bytes with sound scales, against the package."""
    generator = np.random.default_rng(7)
    blocks = generator.integers(0, 256, (3, 2 * size), dtype=np.uint8)
    halves = blocks.reshape(3, 2, size)
    one = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for start in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}[kind]:
        halves[:, :, start : start + 2] = one
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("w", blocks, raw_dtype=GGMLQuantizationType[kind])
    finish(writer)
    file = GgufFile(tmp_path / "x.gguf")
    assert file.tensors["w"].shape == (3, 512)
    np.testing.assert_array_equal(file.read("w"), gguf.quants.dequantize(blocks, GGMLQuantizationType[kind]))


def test_byte_level_tokenizer_is_the_one_that_was_trained(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "llama")
    expected, *_ = byte_level()
    found = tokenizer_of(GgufFile(tmp_path / "model.gguf"))
    for text in ODD:
        assert found.encode(text).ids == expected.encode(text).ids, text
        assert found.decode(found.encode(text).ids, skip_special_tokens=False) == text


def test_wordpiece_tokenizer_is_the_original(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "bert")
    expected, _ = wordpiece()
    expected.no_padding()
    expected.no_truncation()
    found = tokenizer_of(GgufFile(tmp_path / "model.gguf"))
    for text in ODD:
        assert found.encode(text).ids == expected.encode(text).ids, text


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "a",
        "b",
        "ab",
        "\u2581a",
        "\u2581ab",
        "bb",
    ]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -0.5]
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 7])
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(0)
    finish(writer)
    tokenizer = tokenizer_of(GgufFile(tmp_path / "x.gguf"))
    assert tokenizer.encode("ab").tokens == ["<s>", "\u2581ab"]
    # "bb" has the best score, so that it is merged before "ab" can be.
    assert tokenizer.encode("abb").tokens == ["<s>", "\u2581a", "bb"]
    assert tokenizer.encode("é").tokens == ["<s>", "\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é").ids) == "ab é"


def test_a_gguf_becomes_a_bundle_that_routes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.gguf"
    network = write(path, "llama", GGMLQuantizationType.Q8_0)
    out = tmp_path / "bundle"
    arguments = ["--variants", "fp32,int8-weights", "--task", "generate", "--quiet"]
    assert main(["bundle", str(path), "--out", str(out), *arguments]) == 0
    bundle = Bundle.open(out)
    assert (bundle.name, bundle.encoder.pooling, bundle.encoder.max_length) == ("small", "last", 64)
    assert [generator.id for generator in bundle.generators] == ["fp32", "int8-weights"]
    generator = bundle.generators[0]
    assert (generator.layers, generator.kv_heads, generator.head_dim, generator.end_ids) == (LAYERS, 2, 16, (0,))
    checkpoint = load_checkpoint(path)
    encoder = Encoder.load(bundle, variant="fp32")
    for text in ("Fix the login", "", "é"):
        ids = torch.tensor([checkpoint.tokenize([text])[0]])
        with torch.no_grad():
            hidden = network.model(ids).last_hidden_state[0, -1]  # the weights before they were rounded to Q8_0
        expected = torch.nn.functional.normalize(hidden, dim=0).numpy()
        assert float(encoder.encode([text])[0] @ expected) > 0.99
    assert Router.load(bundle).route("Fix the login").ranking
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["architecture"] == "llama"
    assert found["supported"] is True
    assert found["types"] == {"Q8_0": 7 * LAYERS + 2, "F32": 2 * LAYERS + 1}
    assert found["tokenizer"]["pre"] == "gpt-2"
    assert main(["inspect", str(path), "--tensors"]) == 0
    assert "blk.1.ffn_down.weight" in capsys.readouterr().out


def test_an_encoder_cannot_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "x.gguf", "bert")
    arguments = ["bundle", str(tmp_path / "x.gguf"), "--out", str(tmp_path / "out"), "--task", "generate", "--quiet"]
    assert main(arguments) == 1
    assert "no causal language model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_positions_are_held_against_their_table(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, "bert")
    data = bytearray(path.read_bytes())
    set_number(data, data.index(b"bert.context_length") + len("bert.context_length") + 4, "I", 1 << 23)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="context_length is 8388608, but the tensors say 64"):
        load_checkpoint(path)


def set_number(data: bytearray, place: int, code: str, value: int) -> None:
    struct.pack_into("<" + code, data, place, value)


def test_damaged_files_are_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    write(path, "llama")
    sound = path.read_bytes()
    key = sound.index(b"llama.block_count") + len("llama.block_count") + 4
    kind = sound.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    layers: Callable[[bytearray, int], None] = lambda data, value: set_number(data, key, "I", value)  # noqa: E731
    damages: list[tuple[str, Callable[[bytearray], Any]]] = [
        ("does not begin as a GGUF file does", lambda d: d.__setitem__(0, 0)),
        ("GGUF version 9", lambda d: set_number(d, 4, "I", 9)),
        ("announces 1152921504606846976 tensors", lambda d: set_number(d, 8, "Q", 1 << 60)),
        ("announces 1152921504606846976 metadata keys", lambda d: set_number(d, 16, "Q", 1 << 60)),
        ("within a value", lambda d: set_number(d, 24, "Q", 1 << 62)),
        ("cut short", lambda d: d.__delitem__(slice(len(d) - 4096, None))),
        ("within a value", lambda d: d.__delitem__(slice(200, None))),
        ("block_count is 1000000000, but the tensors say 2", lambda d: layers(d, 1_000_000_000)),
        ("block_count is 0", lambda d: layers(d, 0)),
        ("unknown type 999", lambda d: set_number(d, kind, "I", 999)),
        ("is of type IQ1_S", lambda d: set_number(d, kind, "I", int(GGMLQuantizationType.IQ1_S))),
        ("not finite", lambda d: set_number(d, len(d) - 64, "I", 0x7F800000)),
        ("has no place", lambda d: d.__setitem__(slice(0, None), d.replace(b"ffn_gate", b"ffn_gatt"))),
        ("'lIama' is not supported", lambda d: d.__setitem__(slice(0, None), d.replace(b"llama", b"lIama"))),
        ("pre-tokenizer 'gpt-9'", lambda d: d.__setitem__(slice(0, None), d.replace(b"gpt-2", b"gpt-9"))),
        (
            "not UTF-8",
            lambda d: d.__setitem__(slice(0, None), d.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.\xffre")),
        ),
    ]
    for words, damage in damages:
        data = bytearray(sound)
        damage(data)
        path.write_bytes(data)
        assert main(["bundle", str(path), "--out", str(tmp_path / "out"), "--quiet"]) == 1, words
        assert words in capsys.readouterr().err
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        GgufFile(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_any_flipped_header_byte_is_refused_or_read_without_harm(tmp_path: Path) -> None:
    """No crash, no other exception, no allocation beyond the file: flips anywhere before the weights."""
    path = tmp_path / "model.gguf"
    write(path, "llama")
    sound = path.read_bytes()
    end = min(tensor.offset for tensor in GgufFile(path).tensors.values())
    generator = np.random.default_rng(8)
    copy = tmp_path / "copy.gguf"
    refused = 0
    places: NDArray[np.int64] = np.concatenate([np.arange(0, 64), generator.integers(64, end, 120)])
    for place in places.tolist():
        data = bytearray(sound)
        data[place] ^= 1 << int(generator.integers(8))
        copy.write_bytes(data)
        try:
            load_checkpoint(copy)
        except CheckpointError:
            refused += 1
    assert refused > 30


def rewrite(path: Path, changes: dict[str, Any], more: dict[str, NDArray[np.float32]] | None = None) -> Path:
    """A copy of a file with other metadata and further tensors."""
    file, copy = GgufFile(path), path.with_name("copy.gguf")
    writer = GGUFWriter(copy, file.architecture)
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.INT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
    }
    for key, value in (file.metadata | changes).items():
        if key == "general.architecture" and key not in changes:
            continue
        writer.kv_data[0].pop(key, None)
        if isinstance(value, (list, np.ndarray)):
            writer.add_array(key, list(value) if isinstance(value, list) else value.tolist())
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    for name, tensor in ({name: file.read(name) for name in file.tensors} | (more or {})).items():
        writer.add_tensor(name, tensor)
    finish(writer)
    return copy


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_metadata_of_another_kind_are_refused_or_change_nothing(tmp_path: Path, architecture: str) -> None:
    """Every key in turn, by every kind of value: no exception but CheckpointError, in inspect neither."""
    path = tmp_path / "model.gguf"
    write(path, architecture)
    keys = list(GgufFile(path).metadata)
    others: list[Any] = ["odd", -1.5, True, -1, [1, 2], ["a", "b"]]
    if architecture == "bert":  # its vocabulary takes a while to write
        keys = ["bert.pooling_type", "bert.attention.causal", "tokenizer.ggml.cls_token_id"]
        others = ["odd", -1, [1, 2]]
    refused = 0
    for key in keys:
        for other in others:
            copy = rewrite(path, {key: other})
            try:
                with GgufFile(copy) as file:
                    summary(file)
                load_checkpoint(copy)
            except CheckpointError as error:
                refused += 1
                assert "copy.gguf" in str(error)  # noqa: PT017 (others are accepted)
    assert refused > len(keys) * len(others) // 2


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.rope.dimension_count", 8, "rotary embeddings of 8 among 16 values"),
        ("llama.rope.scale_linear", 2.0, "are not supported"),
        ("llama.rope.scaling.type", "yarn", "scaled by 'yarn'"),
        ("llama.attention.head_count_kv", 1 << 30, "1073741824 heads of 16 values do not fit"),
        ("llama.attention.head_count_kv", 3, "3 heads of 16 values do not fit"),
        ("llama.attention.key_length", 1 << 30, "4 heads of 1073741824 values do not fit"),
        ("llama.attention.causal", False, "attention in both directions"),
        ("tokenizer.ggml.eos_token_id", 1 << 30, "eos_token_id is 1073741824, not the id of one of"),
        ("tokenizer.ggml.eos_token_id", -1, "eos_token_id is -1, not the id of one of"),
    ],
)
def test_what_the_network_here_does_not_have_is_refused(tmp_path: Path, key: str, value: object, words: str) -> None:
    write(tmp_path / "model.gguf", "llama")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(rewrite(tmp_path / "model.gguf", {key: value}))


def test_llama_3_factors_of_the_rotary_embedding_are_carried(tmp_path: Path) -> None:
    """Into the network, and into the generating graph, which the export proves token by token."""
    path = tmp_path / "model.gguf"
    write(path, "llama")
    scaled = rewrite(path, {"llama.rope.freq_base": 5e5}, {"rope_freqs.weight": llama_3(5e5)})
    checkpoint = load_checkpoint(scaled)
    found = checkpoint.backbone.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(found, 5e5 ** -(np.arange(0, 16, 2) / 16) / llama_3(5e5), rtol=1e-5)
    assert llama_3(5e5).max() > 7.9
    arguments = ["--variants", "fp32", "--task", "generate", "--quiet"]
    assert main(["bundle", str(scaled), "--out", str(tmp_path / "bundle"), *arguments]) == 0
    assert main(["verify", str(tmp_path / "bundle"), str(scaled)]) == 0
    for wrong in (llama_3(5e5)[:5], llama_3(5e5) * 2, np.full(8, 3, np.float32)):
        with pytest.raises(CheckpointError, match="not those of Llama 3"):
            load_checkpoint(rewrite(path, {"llama.rope.freq_base": 5e5}, {"rope_freqs.weight": wrong}))


def llama_3(theta: float) -> NDArray[np.float32]:
    """The factors that llama.cpp's converter writes for Llama 3.1 with heads of 16 values."""
    turns = 8192 * theta ** -(np.arange(0, 16, 2) / 16) / (2 * np.pi)  # within the original context
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    return (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
