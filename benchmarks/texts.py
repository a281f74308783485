"""Texts that the benchmarks ask about: this project's own tasks, as they are, cut and joined."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from tokenizers import Tokenizer

from benchmarks.record import ROOT

MINI = ROOT / "models" / "ruvltra-mini"


def tasks() -> list[str]:
    """Each task once: of the test split and the blind sets, which nothing was trained on."""
    found: dict[str, None] = {}
    for name in ("test", "blind-a", "blind-b", "blind-c", "blind-d"):
        lines = (MINI / "splits" / f"{name}.jsonl").read_text("utf-8").splitlines()
        found |= dict.fromkeys(json.loads(line)["task"] for line in lines)
    return list(found)


def tokenizer() -> Tokenizer:
    """The mini's, which its peers have as well; it cuts nothing."""
    found = Tokenizer.from_file(str(MINI / "bundle" / "tokenizer.json"))
    found.no_truncation()
    found.no_padding()
    return found


def exactly(tokens: int, count: int) -> list[str]:
    """Tasks of so many tokens, special ones included: longer ones are cut behind a word."""
    cutter = tokenizer()
    found: list[str] = []
    for task in shuffled(tasks()):
        encoding = cutter.encode(task)
        if len(encoding.ids) < tokens:
            continue
        text = task[: encoding.offsets[tokens - 2][1]]
        if len(cutter.encode(text).ids) == tokens and not task[len(text) : len(text) + 1].isalnum():
            found.append(text)
        if len(found) == count:
            return found
    raise ValueError(f"there are {len(found)} tasks of {tokens} tokens, not {count}. Ask for fewer.")


def mixed(count: int) -> list[str]:
    """Texts of mixed lengths: three of five are tasks, one is cut in half, one is two to four tasks joined."""
    pool = shuffled(tasks())
    choose = random.Random(1)
    found = []
    for number in range(count):
        task = pool[number % len(pool)]
        kind = number % 5
        if kind == 3:
            words = task.split()
            task = " ".join(words[: max(1, len(words) // 2)])
        elif kind == 4:
            task = ". ".join([task, *choose.sample(pool, choose.randint(1, 3))])
        found.append(task)
    return found


def lengths(texts: Sequence[str]) -> str:
    """How long they are, in words for the notes."""
    counts = sorted(len(row.ids) for row in tokenizer().encode_batch(list(texts)))
    at = {name: counts[int(share * (len(counts) - 1))] for name, share in _SHARES.items()}
    return f"tokens: {', '.join(f'{name} {value}' for name, value in at.items())}, mean {sum(counts) / len(counts):.1f}"


_SHARES = {"shortest": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}


def shuffled(texts: Sequence[str]) -> list[str]:
    """Always in the same order."""
    found = list(texts)
    random.Random(0).shuffle(found)
    return found
