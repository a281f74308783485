"""A language model's bundle: time, memory, and the same answers? With --llama beside llama.cpp on the same file.

    python -m benchmarks.generate FILE.gguf [--bundle DIR] [--llama PYTHON] [--threads 2] [--continuations N]

PYTHON is an interpreter that has llama-cpp-python. Without --bundle the file is exported first (fp32, int8-weights and
int4-weights, with generating graphs). Both sides get the same texts in turn, each in a process of its own; ratios are
of medians of one session. llama.cpp reads the tokens of a text that is embedded here, which is what its embedding mode
does. "One decision" is `strategy="generate"` here, and there an answer of 8 tokens, as the origin asks for it.
Continuations are 16 greedy tokens, held against the dequantised network in fp32. Memory is that of a process that
embeds, and of another that decides, after they have answered; it holds the mapped file as well as what ONNX Runtime
packed of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.race import Worker
from edge import Bundle, Encoder, Generator
from edge.device import detect
from export.checkpoint import Checkpoint, load_checkpoint
from export.cli import main as export
from export.parity import parity_texts

ROUNDS = 25
TOKENS = 15  # of a text that is embedded
STEPS = 16  # of a continuation

_LLAMA = """
import json, resource, sys, time
from llama_cpp import Llama
path, threads = sys.argv[1], int(sys.argv[2])
start = time.perf_counter()
common = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": 512, "verbose": False}
writer = Llama(path, **common)
print(json.dumps({"load": time.perf_counter() - start}), flush=True)
for line in sys.stdin:
    wanted = json.loads(line)
    start = time.perf_counter()
    if "embed" in wanted:
        writer.reset()
        writer.eval(writer.tokenize(wanted["embed"].encode(), add_bos=False, special=False))
        found = None
    elif "complete" in wanted:
        writer.reset()
        found = writer(wanted["complete"], max_tokens=wanted["tokens"], temperature=0)["choices"][0]["text"]
    else:
        found = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    print(json.dumps({"seconds": time.perf_counter() - start, "found": found}), flush=True)
"""

_OURS = """
import json, resource, sys, time
import numpy as np
from edge import Encoder, Router
path, variant, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
start = time.perf_counter()
if sys.argv[4] == "embed":
    encoder = Encoder.load(path, variant=variant, threads=threads, device="cpu")
else:
    router = Router.load(path, strategy="generate", variant=variant, threads=threads)
print(json.dumps({"load": time.perf_counter() - start}), flush=True)
for line in sys.stdin:
    wanted = json.loads(line)
    start = time.perf_counter()
    if "embed" in wanted:
        found = encoder.encode([wanted["embed"]])[0].tolist()
    elif "route" in wanted:
        found = router.route(wanted["route"]).ranking[0].id
    else:
        found = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    print(json.dumps({"seconds": time.perf_counter() - start, "found": found}), flush=True)
"""


def texts_of(checkpoint: Checkpoint, count: int) -> list[str]:
    """Texts of exactly so many tokens, cut from the exporter's tasks, one after another."""
    ids = [token for row in checkpoint.tokenize(parity_texts("tasks")) for token in row]
    found = []
    for start in range(0, len(ids) - TOKENS, 5):
        text = checkpoint.tokenizer.decode(ids[start : start + TOKENS])
        if len(checkpoint.tokenizer.encode(text).ids) == TOKENS:
            found.append(text)
    return (found * count)[:count]


def short_tasks() -> list[str]:
    """The exporter's tasks, but for those that are long on purpose."""
    return [task for task in parity_texts("tasks") if len(task) < 300]


def race(bundle: Path, variant: str, llama: Worker | None, texts: list[str], threads: int) -> dict[str, Any]:
    """Both sides in turn; ratios of medians."""
    command = [sys.executable, "-c", _OURS, str(bundle), variant, str(threads)]
    embedder, router = Worker([*command, "embed"]), Worker([*command, "route"])
    times: dict[str, list[float]] = {"embed": [], "their embed": [], "route": [], "their route": []}
    for text in texts:
        times["embed"].append(embedder.ask(embed=text)["seconds"])
        if llama is not None:
            times["their embed"].append(llama.ask(embed=text)["seconds"])
    for task in (short_tasks() * ROUNDS)[: len(texts)]:
        times["route"].append(router.ask(route=task)["seconds"])
        if llama is not None:
            answer = llama.ask(complete=f"Route: {task}\nAgent:", tokens=8)
            times["their route"].append(answer["seconds"])
    memory = [round(worker.ask(rss=True)["found"] / 1e6) for worker in (embedder, router)]
    loads = [round(worker.load, 2) for worker in (embedder, router)]
    for worker in (embedder, router):
        worker.close()
    middle = {name: statistics.median(values) * 1e3 for name, values in times.items() if values}
    return {
        "variant": variant,
        **{name: round(value, 2) for name, value in middle.items()},
        **{
            f"{name}_ratio": round(middle[name] / middle[f"their {name}"], 3)
            for name in ("embed", "route")
            if llama is not None
        },
        "load": loads,
        "rss_mb": memory,
    }


@torch.no_grad()
def greedy(checkpoint: Checkpoint, prompts: list[str], end: tuple[int, ...]) -> list[str]:
    """The network's own continuations, of all prompts at once, padded on the left."""
    rows = [torch.tensor(checkpoint.tokenizer.encode(prompt).ids) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    stop = end[0] if end else None
    found = checkpoint.language_model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=list(end),
        pad_token_id=stop,
    )
    answers = [row[ids.shape[1] :].tolist() for row in found]
    kept = [[*itertools.takewhile(lambda token: token not in end, answer)] for answer in answers]
    return [checkpoint.tokenizer.decode(answer) for answer in kept]


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--continuations", type=int, default=50, metavar="N")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.bundle or Path(name, "bundle")
        started = time.monotonic()
        if options.bundle is None:
            arguments = ["--task", "embed,generate", "--variants", "fp32,int8-weights,int4-weights", "--quiet"]
            arguments += ["--minimum-cosine", "int4-weights=0.8", "--minimum-cosine", "int8-weights=0.98"]
            assert export(["bundle", str(options.file), "--out", str(folder), *arguments]) == 0
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"exported in {time.monotonic() - started:.0f} s, peak memory {peak:.1f} GB")
        return measure(options, folder)


def measure(options: argparse.Namespace, folder: Path) -> int:
    """On a bundle that is there."""
    checkpoint = load_checkpoint(options.file)
    bundle = Bundle.open(folder)
    texts = texts_of(checkpoint, ROUNDS)
    device = detect()
    print(f"{options.file.name}: {options.file.stat().st_size / 1e6:.0f} MB; {device.cpu}, {options.threads} threads")
    llama = None
    if options.llama is not None:
        llama = Worker([options.llama, "-c", _LLAMA, str(options.file), str(options.threads)])
    results = []
    reference = np.stack([np.array(_unit(checkpoint, text)) for text in texts])
    for generator in bundle.generators:
        result = race(folder, generator.id, llama, texts, options.threads)
        vectors = Encoder.load(bundle, variant=generator.id, device="cpu").encode(texts)
        cosines = (vectors * reference).sum(1)
        result["cosine_mean"], result["cosine_min"] = round(float(cosines.mean()), 5), round(float(cosines.min()), 5)
        result["mb"] = round(generator.weights.bytes / 1e6)
        results.append(result)
    if llama is not None:
        rss = llama.ask(rss=True)["found"] / 1e6
        print(f"llama.cpp: loads in {llama.load:.2f} s, {rss:.0f} MB\n")
        llama.close()
    if options.continuations:
        prompts = [f"{before}{task}\nAgent:" for before in ("Route: ", "Task: ") for task in short_tasks()]
        prompts = prompts[: options.continuations]
        end = bundle.generators[0].end_ids
        expected = greedy(checkpoint, prompts, end)
        for result in results:
            writer = Generator.load(bundle, generator=result["variant"], threads=options.threads)
            same = sum(
                writer.generate(prompt, STEPS).rstrip()
                == text.rstrip("\ufffd").rstrip()  # half a character is left out
                for prompt, text in zip(prompts, expected, strict=True)
            )
            result["same"] = f"{same} of {len(prompts)}"
    print(
        "| variant | MB | cosine to fp32, mean | min | embed, ms | / llama.cpp | decide, ms | / llama.cpp's 8 tokens "
        "| load, s | memory embedding, MB | memory deciding, MB | same continuations |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for r in results:
        row = (r["variant"], r["mb"], r["cosine_mean"], r["cosine_min"], r["embed"], r.get("embed_ratio", "-"))
        row += (r["route"], r.get("route_ratio", "-"), r["load"][0], *r["rss_mb"], r.get("same", "-"))
        print("| " + " | ".join(map(str, row)) + " |")
    if options.json:
        options.json.write_text(json.dumps({"machine": device.cpu, "threads": options.threads, "rows": results}) + "\n")
    return 0


@torch.no_grad()
def _unit(checkpoint: Checkpoint, text: str) -> Any:
    hidden = checkpoint.backbone(torch.tensor([checkpoint.tokenize([text])[0]])).last_hidden_state[0]
    pooled = hidden[-1] if checkpoint.pooling == ("lasttoken",) else hidden.mean(0)
    return torch.nn.functional.normalize(pooled, dim=0).numpy()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
