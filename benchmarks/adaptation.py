"""What `mine-commits` and `finetune --from` bring for a repository, and what is lost elsewhere.

    python -m benchmarks.adaptation COMMITS.jsonl [--from DIR] [--keep FILE.jsonl ...]

COMMITS.jsonl holds rows of `ruvltra-export mine-commits`. For each source (repository) the older
half of its commits adapts the bundle, the newer half judges it; the other files show what the
adapted router still knows. Accuracy is the embedding's top-1, int8.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from edge.bundle import default_bundle
from edge.evaluate import Proportion, evaluate, read_labelled
from edge.router import Router


def top1(bundle: Path, path: Path) -> Proportion:
    router = Router.load(bundle)
    rows = [r for r in read_labelled(path, [a.name for a in router.agents]) if r.agent != "none"]
    return evaluate(router, rows, ["embedding"])[0].top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", type=Path, metavar="COMMITS.jsonl")
    parser.add_argument("--from", dest="start", type=Path, default=default_bundle(), metavar="DIR")
    parser.add_argument("--recipe", type=Path, metavar="RECIPE.toml", help="train on the recipe's data along")
    parser.add_argument("--recipe-commits", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--keep", type=Path, action="append", default=[], metavar="FILE.jsonl")
    options = parser.parse_args()
    by_source: dict[str, list[str]] = defaultdict(list)
    for line in options.commits.read_text(encoding="utf-8").splitlines():
        by_source[json.loads(line)["source"]].append(line)
    for source, lines in by_source.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            half = len(lines) // 2
            (folder / "older.jsonl").write_text("\n".join(lines[:half]))
            (folder / "newer.jsonl").write_text("\n".join(lines[half:]))
            export = [sys.executable, "-m", "export.cli"]
            recipe = [str(options.recipe), "--commits", str(options.recipe_commits)] if options.recipe else []
            tail = ["--from", str(options.start), "--extra", str(folder / "older.jsonl"), "--quiet"]
            out = ["--out", str(folder / "adapted")]
            subprocess.run([*export, "finetune", *recipe, *tail, *out], check=True, stdout=subprocess.DEVNULL)
            bundle = [
                "bundle",
                str(folder / "adapted"),
                "--variants",
                "int8",
                "--out",
                str(folder / "bundle"),
                "--quiet",
            ]
            subprocess.run([*export, *bundle], check=True, stdout=subprocess.DEVNULL)
            print(f"{source}: {half} older commits to adapt, {len(lines) - half} newer to judge")
            for path in (folder / "newer.jsonl", *options.keep):
                before, after = top1(options.start, path), top1(folder / "bundle", path)
                print(f"  {path.stem:<24}n = {before.n:<6}before {before}  after {after}", flush=True)


if __name__ == "__main__":
    main()
