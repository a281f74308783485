"""The files that peers load, all of ruvltra-mini's own checkpoint: made once, in the work folder.

What needs a peer's own tools is made by them, in its environment: this file runs there as a script,

    python models.py NAME SOURCE OUT [CALIBRATION]

so that it imports nothing of this project at the top. ONNX and OpenVINO are the peers' own exports, not ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

_TABLES = ("position_embd.weight", "token_types.weight")  # which llama.cpp wants as floats
STATIC_DIM = 116  # float16 rows of 29,500 tokens: as large as ruvltra-nano's bundle, 7.3 MB


def checkpoint(source: Path, out: Path) -> None:
    """A sentence-transformers folder in fp32, with every file that they save."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(source), device="cpu", model_kwargs={"dtype": torch.float32})
    model.save_pretrained(str(out))


def onnx(source: Path, out: Path) -> None:
    """sentence-transformers' export, and its dynamic quantisation for this machine."""
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    model = SentenceTransformer(
        str(source), backend="onnx", device="cpu", model_kwargs={"provider": "CPUExecutionProvider", "export": True}
    )
    model.save_pretrained(str(out))
    export_dynamic_quantized_onnx_model(model, _instructions(), str(out), file_suffix="int8")


def _instructions() -> str:
    """Which of the ready quantisations suits this processor."""
    import platform

    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return "avx2"
    return "avx512_vnni" if "avx512_vnni" in flags else "avx512" if "avx512f" in flags else "avx2"


def openvino(source: Path, out: Path, calibration: Path) -> None:
    """sentence-transformers' export, and its static quantisation, calibrated with tasks of this project."""
    from optimum.intel import OVQuantizationConfig
    from sentence_transformers import SentenceTransformer, export_static_quantized_openvino_model

    model = SentenceTransformer(str(source), backend="openvino", device="cpu", model_kwargs={"export": True})
    model.save_pretrained(str(out))
    export_static_quantized_openvino_model(
        model,
        quantization_config=OVQuantizationConfig(),
        model_name_or_path=str(out),
        dataset_name=str(calibration),
        dataset_config_name="default",
        dataset_split="train",
        column_name="task",
        file_suffix="int8",
    )


def static(source: Path, out: Path) -> None:
    """model2vec's own distillation of the checkpoint."""
    from model2vec.distill import distill

    distill(model_name=str(source), pca_dims=STATIC_DIM).save_pretrained(str(out))


def gguf(source: Path, out: Path) -> None:
    """The checkpoint as llama.cpp reads it: F32, and Q8_0 for the matrices."""
    import numpy as np
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter, PoolingType, TokenType, get_tensor_name_map
    from gguf.constants import MODEL_ARCH
    from gguf.quants import quantize
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text("utf-8"))
    vocabulary = json.loads((source / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    names = get_tensor_name_map(MODEL_ARCH.BERT, config["num_hidden_layers"])
    weights = load_file(source / "model.safetensors")
    for kind, file in ((Kind.F32, "mini-f32.gguf"), (Kind.Q8_0, "mini-q8_0.gguf")):
        writer = GGUFWriter(out / file, "bert")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_causal_attention(False)
        writer.add_pooling_type(PoolingType.MEAN)
        writer.add_tokenizer_model("bert")
        # Words begin with U+2581 there, and what continues one has no mark.
        writer.add_token_list([_piece(token, special.values()) for token in tokens])
        writer.add_token_types([TokenType.CONTROL if t in special.values() else TokenType.NORMAL for t in tokens])
        writer.add_token_type_count(config["type_vocab_size"])
        writer.add_bos_token_id(vocabulary[special["cls"]])  # which is CLS there
        writer.add_eos_token_id(vocabulary[special["sep"]])
        writer.add_sep_token_id(vocabulary[special["sep"]])
        writer.add_pad_token_id(vocabulary[special["pad"]])
        writer.add_unk_token_id(vocabulary[special["unk"]])
        writer.add_mask_token_id(vocabulary[special["mask"]])
        for name, values in weights.items():
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None:  # position ids, a pooler: no part of the vectors
                continue
            values = values.astype(np.float32)
            if kind == Kind.Q8_0 and values.ndim == 2 and target not in _TABLES:
                writer.add_tensor(target, quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(target, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _piece(token: str, special: object) -> str:
    if token in special:  # type: ignore[operator]
        return token
    return token[2:] if token.startswith("##") else "\u2581" + token


MAKERS: dict[str, Callable[..., None]] = {
    "checkpoint": checkpoint,
    "onnx": onnx,
    "openvino": openvino,
    "static": static,
    "gguf": gguf,
}

if __name__ == "__main__":
    MAKERS[sys.argv[1]](*map(Path, sys.argv[2:]))
