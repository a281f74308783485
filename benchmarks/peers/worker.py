"""Runs inside a peer's environment, with nothing but the standard library and what is installed there.

    python worker.py LOADER --model PATH [--file NAME] --threads N [--use latency|throughput] [--once TEXT]

Its first line is {"load": seconds}; then it answers one JSON question a line:

    {"do": "encode", "texts": [...], "seconds": 0.05}     {"seconds": [one a call]}
    {"do": "route", ...}                                  the same, by decisions
    {"do": "vectors", "texts": [...]}                     {"vectors": [[...]]}, each text alone
    {"do": "agents", "texts": [...]}                      {"agents": [...]}
    {"do": "rss"}                                         {"bytes": now, "peak": ...}

A call is one of the peer's public API as its documentation shows it: with the whole list, or with "each" one a text.
It is repeated until ``seconds`` have passed and ``passes`` (3) were made; "batch" is handed on where there is one.
"""

# ruff: noqa: ARG002 - every peer is loaded and asked in the same way

import argparse
import json
import os
import resource
import sys
import time

BATCH = 32


class Ours:
    """edge.Encoder, or edge.Router, which has one."""

    def __init__(self, path, file, threads, use):
        from edge import Router

        # Several texts run side by side, one a core, where one text has one thread.
        self.router = Router.load(path, device="cpu", threads=threads if use == "latency" else 1)
        self.encoder = self.router.encoder

    def encode(self, texts, batch):
        return self.encoder.encode(texts)

    def route(self, texts):
        return [decision.agent for decision in self.router.route_many(texts)]


class Torch:
    """sentence-transformers as it comes."""

    back_end = "torch"

    def __init__(self, path, file, threads, use):
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        options = self.settings(file, threads)
        self.model = SentenceTransformer(path, backend=self.back_end, device="cpu", model_kwargs=options)

    def settings(self, file, threads):
        return {}

    def encode(self, texts, batch):
        return self.model.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)


class Onnx(Torch):
    """sentence-transformers on ONNX Runtime."""

    back_end = "onnx"

    def settings(self, file, threads):
        return {"provider": "CPUExecutionProvider", "file_name": file, "session_options": session_options(threads)}


class OpenVino(Torch):
    """sentence-transformers on OpenVINO."""

    back_end = "openvino"
    precision = ()

    def settings(self, file, threads):
        return {"file_name": file, "ov_config": {"INFERENCE_NUM_THREADS": threads, **dict(self.precision)}}


class OpenVinoF32(OpenVino):
    """The same without bfloat16, which OpenVINO takes by itself where the CPU has it."""

    precision = (("INFERENCE_PRECISION_HINT", "f32"),)


class Optimum:
    """ORTModelForFeatureExtraction with pooling in numpy."""

    def __init__(self, path, file, threads, use):
        import numpy
        from optimum.onnxruntime import ORTModelForFeatureExtraction
        from transformers import AutoTokenizer

        self.numpy = numpy
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = ORTModelForFeatureExtraction.from_pretrained(
            path,
            subfolder=os.path.dirname(file),
            file_name=os.path.basename(file),
            session_options=session_options(threads),
        )

    def encode(self, texts, batch):
        return self.numpy.concatenate([self.some(texts[i : i + batch]) for i in range(0, len(texts), batch)])

    def some(self, texts):
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="np")
        states = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None]
        vectors = (states * mask).sum(1) / mask.sum(1)
        return vectors / self.numpy.linalg.norm(vectors, axis=1, keepdims=True)


class FastEmbed:
    """fastembed with a model of one's own."""

    def __init__(self, path, file, threads, use):
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        TextEmbedding.add_custom_model(
            model="ruvltra-mini",
            pooling=PoolingType.MEAN,
            normalization=True,
            sources=ModelSource(hf="local/ruvltra-mini"),
            dim=384,
            model_file=file,
        )
        self.model = TextEmbedding("ruvltra-mini", specific_model_path=path, threads=threads)

    def encode(self, texts, batch):
        return list(self.model.embed(texts, batch_size=batch))


class SemanticRouter:
    """A route an agent, by examples; its encoder is transformers on torch."""

    def __init__(self, path, file, threads, use):
        import torch
        from semantic_router.encoders import HuggingFaceEncoder

        torch.set_num_threads(threads)
        self.encoder = HuggingFaceEncoder(name=path, device="cpu")
        self.examples = os.path.join(path, "routes.json")
        self.router = None

    def encode(self, texts, batch):
        return self.encoder(texts, batch_size=batch)

    def route(self, texts):
        if self.router is None:  # which embeds the examples: a first vector does without
            from semantic_router import Route
            from semantic_router.routers import IndexedRouter

            with open(self.examples, encoding="utf-8") as stream:
                routes = [Route(name=name, utterances=said) for name, said in json.load(stream).items()]
            self.router = IndexedRouter(encoder=self.encoder, routes=routes)
        return [self.router(text).name for text in texts]


class Llama:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, path, file, threads, use):
        from llama_cpp import LLAMA_POOLING_TYPE_LAST, LLAMA_POOLING_TYPE_UNSPECIFIED
        from llama_cpp import Llama as Model

        self.model = Model(
            os.path.join(path, file) if file else path,
            embedding=True,
            # An encoder's file says how its states become a vector, a causal model's does not.
            pooling_type=LLAMA_POOLING_TYPE_UNSPECIFIED if file else LLAMA_POOLING_TYPE_LAST,
            n_threads=threads,
            n_threads_batch=threads,
            n_ctx=512,
            verbose=False,
        )

    def encode(self, texts, batch):
        some = (self.model.embed(texts[i : i + batch], normalize=True) for i in range(0, len(texts), batch))
        return [vector for vectors in some for vector in vectors]


class Model2Vec:
    """A static model: a table of vectors and a mean."""

    def __init__(self, path, file, threads, use):
        from model2vec import StaticModel

        self.model = StaticModel.from_pretrained(path)

    def encode(self, texts, batch):
        return self.model.encode(texts, batch_size=batch, use_multiprocessing=False)


LOADERS = {
    "ours": Ours,
    "torch": Torch,
    "onnx": Onnx,
    "openvino": OpenVino,
    "openvino-f32": OpenVinoF32,
    "optimum": Optimum,
    "fastembed": FastEmbed,
    "semantic-router": SemanticRouter,
    "llama": Llama,
    "model2vec": Model2Vec,
}


def session_options(threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options


def answer(peer, wanted):
    """What a question gets."""
    if wanted["do"] == "rss":
        return memory()
    if wanted["do"] == "vectors":
        return {"vectors": [[float(x) for x in peer.encode([text], BATCH)[0]] for text in wanted["texts"]]}
    if wanted["do"] == "agents":
        return {"agents": peer.route(wanted["texts"])}
    calls = [[text] for text in wanted["texts"]] if wanted.get("each") else [wanted["texts"]]
    batch = wanted.get("batch", BATCH)
    do = peer.route if wanted["do"] == "route" else lambda texts: peer.encode(texts, batch)
    if wanted.get("each"):
        do(calls[0])  # another process has just had the caches
    times, passes = [], 0
    end = time.perf_counter() + wanted.get("seconds", 0)
    while passes < wanted.get("passes", 3) or time.perf_counter() < end:
        for texts in calls:
            start = time.perf_counter()
            do(texts)
            times.append(time.perf_counter() - start)
        passes += 1
    return {"seconds": times}


def memory():
    """Resident bytes now and at most.

    Not by getrusage on Linux: its maximum has that of the process that started this one in it.
    """
    try:
        with open("/proc/self/status") as stream:
            kilobytes = {line.split(":")[0]: line.split()[1] for line in stream if line.startswith("Vm")}
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"bytes": peak, "peak": peak}
    return {"bytes": 1024 * int(kilobytes["VmRSS"]), "peak": 1024 * int(kilobytes["VmHWM"])}


def confine(threads):
    """No more cores than threads, and no library that starts more of them: whatever its own default is."""
    if hasattr(os, "sched_setaffinity"):
        # The last ones: the first does the system's work.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"


def main():
    start = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("loader", choices=LOADERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--file", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--use", choices=("latency", "throughput"), default="latency")
    parser.add_argument("--once", metavar="TEXT")
    parser.add_argument("--do", choices=("vectors", "agents"), default="vectors")
    options = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    confine(options.threads)
    peer = LOADERS[options.loader](options.model, options.file, options.threads, options.use)
    if options.once is not None:
        found = answer(peer, {"do": options.do, "texts": [options.once]})
        print(json.dumps(found), file=replies, flush=True)
        return
    peer.encode(["warm"], BATCH)
    print(json.dumps({"load": time.perf_counter() - start}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(peer, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
