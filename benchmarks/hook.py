"""Claude Code's hook as a whole process, beside a process that only imports what it stands on.

    python -m benchmarks.hook [--quick] [--json OUT]

Ten agents of one's own, their prototypes kept by an earlier run, as they are after a session's first prompt; and the
thirteen that are built in. Processes run in turn; ratios are to a Python process that only imports numpy, onnxruntime
and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks import record

IMPORTS = "import of numpy, onnxruntime, tokenizers"
PROMPT = "the index on the orders table is not used, make the query quick again"
KINDS = {
    "dba": "Postgres schema, indexes, slow queries, vacuum, replication.",
    "mobile": "iOS and Android apps, Swift, Kotlin, app store releases.",
    "frontend": "React components, CSS, layout, accessibility of pages.",
    "billing": "Invoices, refunds, payment providers, taxes.",
    "search": "Search index, ranking, synonyms, autocomplete.",
    "data": "Pipelines, warehouse tables, dashboards, nightly jobs.",
    "infra": "Terraform, Kubernetes, networks, certificates.",
    "ml": "Training, evaluation and serving of models.",
    "support": "Answers to customers, help pages, known issues.",
    "games": "Unity scenes, shaders, physics, input.",
}


def project(folder: Path) -> None:
    """A project with ten agents."""
    agents = folder / ".claude" / "agents"
    agents.mkdir(parents=True)
    for name, description in KINDS.items():
        text = f"---\nname: {name}\ndescription: {description}\ntools: Read, Grep\n---\n\nYou are the {name} agent.\n"
        (agents / f"{name}.md").write_text(text, "utf-8")


def once(command: list[str], folder: Path, home: Path) -> float:
    """Seconds of one process; the hook has to answer."""
    request = json.dumps({"prompt": PROMPT, "cwd": str(folder), "hook_event_name": "UserPromptSubmit"})
    environment = os.environ | {"HOME": str(home), "RUVLTRA_CACHE": str(home / "cache")}
    environment.pop("CLAUDE_PROJECT_DIR", None)
    started = time.perf_counter()
    done = subprocess.run(
        command, input=request, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - started
    if "hook" in command and "additionalContext" not in done.stdout:
        raise SystemExit(f"the hook gave no answer: {done.stdout!r} {done.stderr!r}")
    return seconds


def measure(rounds: int) -> list[record.Row]:
    """Rows of seconds."""
    found: dict[str, list[float]] = {IMPORTS: [], "hook, ten agents of one's own": [], "hook, built-in agents": []}
    hook = [str(Path(sys.executable).with_name("ruvltra")), "hook", "user-prompt-submit"]
    with tempfile.TemporaryDirectory() as scratch:
        own, none, home = (Path(scratch) / name for name in ("own", "none", "home"))
        for folder in (own, none, home):
            folder.mkdir()
        project(own)
        ways = [
            ([sys.executable, "-c", "import numpy, onnxruntime, tokenizers"], none),
            (hook, own),
            (hook, none),
        ]
        for number in tqdm(range(rounds + 2), "processes", leave=False):
            turn = number % len(ways)
            taken = {}
            for place in [*range(turn, len(ways)), *range(turn)]:
                command, folder = ways[place]
                taken[place] = once(command, folder, home)
            if number >= 2:  # the first fill the caches, the system's and ours
                for place, name in enumerate(found):
                    found[name].append(taken[place])
    return [record.timed("one process", name, "wall", "s", values, found[IMPORTS]) for name, values in found.items()]


def main() -> int:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks hook", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seven rounds")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    rows = measure(7 if options.quick else 40)
    record.finish("hook", rows, options, {}, [f"ratios are to: {IMPORTS}"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
