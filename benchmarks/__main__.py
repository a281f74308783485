"""Measurements beside what a user would pick instead.

python -m benchmarks QUESTION [options]     (--help after a question shows its options)
python -m benchmarks --check OLD.json NEW.json [--tolerance 0.1]

"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks.record import compare

QUESTIONS = {
    "latency": "one text, warm: ours beside other ways to embed or route it",
    "throughput": "10,000 texts of mixed lengths: texts a second and memory",
    "cold": "a whole process, from its start to the first decision",
    "accuracy": "the same labelled files through every router",
    "curves": "what a decision costs as tasks, agents, threads and batches grow",
    "limit": "session and route beside the machine's limit: roofline, stages, operators",
    "retrieval": "the index beside hnswlib, usearch, faiss and exact search",
    "capabilities": "which of the catalogue's tools a request is for",
    "durability": "a writer killed again and again; readers beside it",
    "generate": "a language model's bundle beside llama.cpp",
    "export": "exported models beside sentence-transformers, transformers and llama.cpp",
    "serve": "the HTTP server under load, with batches and without",
    "hook": "Claude Code's hook as a whole process",
    "browser": "the page in Chromium, and Node, beside Python",
    "coreml": "CoreML packages in an evaluator beside the network",
    "before": "this checkout beside another commit of it",
    "threads": "whether the default threads are the best ones",
    "fusion": "what leaving layer norms unfused brings",
    "adaptation": "what training on one's own history brings",
    "ablation": "what each part of the training brings",
    "keywords": "which keywords lower accuracy",
}


def main(arguments: list[str]) -> int:
    """Run a question, or hold two results against each other."""
    questions = "\n".join(f"  {name:<14}{what}" for name, what in QUESTIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"{__doc__}questions:\n{questions}",
        usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if arguments and arguments[0] in QUESTIONS:
        sys.argv[:] = [f"python -m benchmarks {arguments[0]}", *arguments[1:]]
        return importlib.import_module(f"benchmarks.{arguments[0]}").main() or 0
    parser.add_argument("question", nargs="?", choices=QUESTIONS, metavar="QUESTION")
    parser.add_argument("--check", nargs=2, type=Path, metavar=("OLD.json", "NEW.json"))
    parser.add_argument("--tolerance", type=float, default=0.1, help="share by which a figure may be worse (0.1)")
    options = parser.parse_args(arguments)
    if options.check is None:
        parser.print_help()
        return 2
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in options.check)
    if old["question"] != new["question"]:
        parser.error(f"the results answer different questions: {old['question']!r} and {new['question']!r}")
    worse, compared = compare(old, new, options.tolerance)
    for line in worse:
        print(f"worse: {line}")
    print(f"{len(worse)} of {compared} figures are worse by more than {options.tolerance:.0%}")
    return 1 if worse or not compared else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
