"""Writes docs/cli.md from the commands' own help texts; a test checks that it is current.

python docs/generate_cli.py
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import edge.cli
import export.cli

INTRODUCTION = """# Command line

Made by `python docs/generate_cli.py` from the commands' own help texts.

Standard output carries results only; messages and progress go to standard error. Exit status: 0 done,
1 error, 2 wrong usage, 3 a single task that `ruvltra route` abstains from.

`ruvltra route --json` writes one object a line, in the order of the tasks:

| key | |
|---|---|
| `task` | the task, lone surrogates and bytes that are not UTF-8 replaced by U+FFFD |
| `agent` | name of the agent, or `null` if the router abstains |
| `method` | `keyword`, `embedding`, `hybrid` or `abstain` |
| `confidence` | calibrated probability of the first agent of the ranking |
| `margin` | its lead over the second |
| `matched` | keywords that spoke for it |
| `ranking` | all agents, most probable first: `id`, `score` (probability), `cosine` (`null` for `keyword`) |
| `truncated` | the task was too long and only its beginning was looked at |
| `ms` | time for this task, loading not included |

`ruvltra capabilities --json` and `ruvltra memory search --json` do so with `query`, `hits` (best first, each with `id`,
`score` and what it says) and `ms`.
"""


def page() -> str:
    os.environ["COLUMNS"] = "100"
    parts = [INTRODUCTION]
    for parser in (edge.cli._parser(), export.cli._parser()):
        parts.append(f"## {parser.prog}\n\n```text\n{parser.format_help()}```\n")
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for verb in action.choices.values():
                    parts.append(f"### {verb.prog}\n\n```text\n{verb.format_help()}```\n")
                    for inner in verb._actions:
                        if isinstance(inner, argparse._SubParsersAction):
                            for nested in inner.choices.values():
                                parts.append(f"#### {nested.prog}\n\n```text\n{nested.format_help()}```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page(), encoding="utf-8")
