"""What a user would pick instead: each with the environment it runs in, its model's files, and how close it must come.

Peers of the same backbone run ruvltra-mini's own checkpoint: their vectors are held against our fp32 ones before
anything is timed. The others (``bound`` None) are other models, named for what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

INT8, FP32 = 0.95, 0.999  # lowest cosine to our fp32 vectors

_TORCH = ("torch==2.13.0", "numpy==2.3.5")
_SENTENCES = ("sentence-transformers==5.7.0", *_TORCH)
# AMX is left out: with it llama-cpp-python 0.3.36 crashes on a virtual machine that reports it.
_LLAMA = (
    "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON "
    "-DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"
)


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed apart from everything else.

    Attributes:
        requirements: Exact versions; of npm packages where ``npm`` is set.
        variables: For the installer's process: (name, value).
        npm: A folder of node modules instead of Python's packages.
        checkout: This checkout is installed as well.
    """

    requirements: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    npm: bool = False
    checkout: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """One subject of the benchmarks.

    Attributes:
        subject: Its name in results.
        environment: Where it runs; a key of ENVIRONMENTS.
        loader: What loads it; a key of ``worker.LOADERS``, or the file of a script for node.
        model: What is prepared for it; a name of ``models.MODELS``, or empty.
        file: Which file of the model's folder it loads, where it has to be told.
        bound: Lowest cosine to our fp32 vectors; None for another model.
        asks: What it answers: ``encode``, ``route`` to an agent, or ``tier``, which names a size of language model.
        note: What has to be said of it wherever it is measured.
    """

    subject: str
    environment: str
    loader: str
    model: str = ""
    file: str = ""
    bound: float | None = None
    asks: tuple[str, ...] = ("encode",)
    note: str = ""


_OPENVINO, _OPENVINO_INT8 = "openvino/openvino_model.xml", "openvino/openvino_model_int8.xml"

ENVIRONMENTS = {
    "ours": Environment(("onnxruntime==1.32.0", "tokenizers==0.22.2", "numpy==2.3.5"), checkout=True),
    "sentences": Environment(
        (*_SENTENCES, "transformers==4.57.6", "optimum-onnx==0.1.0", "onnxruntime==1.32.0", "onnx==1.23.2")
    ),
    "openvino": Environment(
        (
            *_SENTENCES,
            "transformers==4.57.6",
            "optimum-intel==1.27.0",
            "openvino==2026.4.1",
            "nncf==3.3.0",
            "datasets==4.5.0",
        )
    ),
    "fastembed": Environment(("fastembed==0.9.1", "onnxruntime==1.32.0", "numpy==2.3.5")),
    "semantic-router": Environment(("semantic-router==1.1.1", "transformers==4.57.6", *_TORCH)),
    "llama.cpp": Environment(("llama-cpp-python==0.3.36", "numpy==2.4.6"), variables=(("CMAKE_ARGS", _LLAMA),)),
    "model2vec": Environment(("model2vec==0.10.0", "tokenizers==0.22.2", "numpy==2.3.5")),
    # Only to distil the model of model2vec: its runtime needs none of this.
    "distil": Environment(("model2vec[distill,quantization]==0.10.0", *_TORCH)),
    "ruvllm": Environment(("@ruvector/ruvllm@2.6.2",), npm=True),
}

PEERS = {
    "mini-int8": Peer("ruvltra-mini int8", "ours", "ours", "mini-int8", bound=INT8, asks=("encode", "route")),
    "mini-fp32": Peer("ruvltra-mini fp32", "ours", "ours", "mini-fp32", bound=FP32, asks=("encode", "route")),
    "nano": Peer("ruvltra-nano", "ours", "ours", "nano", asks=("encode", "route")),
    "st": Peer("sentence-transformers, torch", "sentences", "torch", "checkpoint", bound=FP32),
    "st-onnx": Peer("sentence-transformers, onnx", "sentences", "onnx", "onnx", "onnx/model.onnx", FP32),
    "st-onnx-int8": Peer("sentence-transformers, onnx int8", "sentences", "onnx", "onnx", "onnx/model_int8.onnx", INT8),
    "st-openvino": Peer(
        "sentence-transformers, openvino",
        "openvino",
        "openvino",
        "openvino",
        _OPENVINO,
        FP32,
        note="as it comes, in bfloat16 on a CPU that has it",
    ),
    "st-openvino-f32": Peer(
        "sentence-transformers, openvino f32", "openvino", "openvino-f32", "openvino", _OPENVINO, FP32
    ),
    "st-openvino-int8": Peer(
        "sentence-transformers, openvino int8",
        "openvino",
        "openvino",
        "openvino",
        _OPENVINO_INT8,
        INT8,
        note="as it comes, in bfloat16 between the products on a CPU that has it",
    ),
    "st-openvino-int8-f32": Peer(
        "sentence-transformers, openvino int8 f32",
        "openvino",
        "openvino-f32",
        "openvino",
        _OPENVINO_INT8,
        INT8,
        note="float32 between the products",
    ),
    "optimum": Peer("optimum ORTModel", "sentences", "optimum", "onnx", "onnx/model.onnx", FP32),
    "fastembed": Peer("fastembed", "fastembed", "fastembed", "onnx", "onnx/model.onnx", FP32),
    "fastembed-int8": Peer("fastembed, int8", "fastembed", "fastembed", "onnx", "onnx/model_int8.onnx", INT8),
    "semantic-router": Peer(
        "semantic-router, torch",
        "semantic-router",
        "semantic-router",
        "checkpoint",
        bound=FP32,
        asks=("encode", "route"),
        note="each agent's description and 10 tasks of the training data are its utterances, embedded at every start",
    ),
    "llama-f32": Peer("llama.cpp F32", "llama.cpp", "llama", "gguf", "mini-f32.gguf", FP32),
    "llama-q8": Peer("llama.cpp Q8_0", "llama.cpp", "llama", "gguf", "mini-q8_0.gguf", INT8),
    "llama-causal": Peer(
        "llama.cpp, causal model of --gguf",
        "llama.cpp",
        "llama",
        note="embeds by that model, whose size and quantisation are those of the file",
    ),
    "model2vec": Peer("model2vec, distilled", "model2vec", "model2vec", "static"),
    "ruvllm": Peer(
        "@ruvector/ruvllm",
        "ruvllm",
        "ruvllm.js",
        asks=("encode", "tier"),
        note="the package holds no trained weights: another instance gives another vector of the same text, and the "
        "order of words does not count; its route names a size of language model, not an agent",
    ),
    "ruvllm-keywords": Peer(
        "@ruvector/ruvllm, keyword baseline",
        "ruvllm",
        "ruvllm.js",
        asks=("route",),
        note="baselineKeywordRouter, which names an agent by substrings of 13 lists of words",
    ),
}
