"""What `mine-commits` and `finetune --from --extra` bring for a repository, and what is lost elsewhere.

    python -m benchmarks.adaptation HISTORY.jsonl [...] [--judge FILE.jsonl] [--from BUNDLE] [--keep FILE.jsonl ...]

HISTORY.jsonl is what `ruvltra-export mine-commits` wrote of one repository. Its older half adapts the
bundle and its newer half judges it. With --judge, the whole history adapts, and that file's rows of the
same repository (by their "source") judge. What is near a row that judges does not adapt. The --keep
files show what the adapted router still knows. Accuracy is the embedding's top-1, int8 after adapting.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from edge.bundle import default_bundle
from edge.evaluate import Proportion, evaluate, read_labelled
from edge.router import Router
from export.dataset import normalise, read_jsonl

_NEAR = 0.6  # token-set Jaccard similarity, as in the recipes' splits


def top1(bundle: Path, path: Path) -> Proportion:
    router = Router.load(bundle)
    rows = [r for r in read_labelled(path, [a.name for a in router.agents]) if r.agent != "none"]
    return evaluate(router, rows, ["embedding"])[0].top1


Row = dict[str, object]


def parts(history: Path, judge: Path | None) -> tuple[list[Row], list[Row]]:
    """Rows to adapt with and rows to judge by, which no row of the first is near."""
    rows = [row for _, row in read_jsonl(history)]
    sources = {_repository(row) for row in rows}
    if len(sources) != 1:
        raise SystemExit(f"{history}: has tasks of {len(sources)} repositories. Mine one repository a file.")
    if judge is None:
        rows, judges = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    else:
        judges = [row for _, row in read_jsonl(judge) if _repository(row) in sources]
    if not rows or not judges:
        raise SystemExit(f"{history}: {len(rows)} tasks to adapt with, {len(judges)} to judge by. Both are needed.")
    held = [frozenset(normalise(str(row["task"])).split()) for row in judges]

    def near(row: Row) -> bool:
        words = frozenset(normalise(str(row["task"])).split())
        return any(len(words & other) >= _NEAR * len(words | other) for other in held)

    return [row for row in rows if not near(row)], judges


def _repository(row: Row) -> str:
    """The last part of a row's source, which is all that `mine-commits` knows."""
    return str(row.get("source", "")).rpartition("/")[2]


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("histories", type=Path, nargs="+", metavar="HISTORY.jsonl")
    parser.add_argument("--judge", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--from", dest="start", type=Path, default=default_bundle(), metavar="BUNDLE")
    parser.add_argument("--keep", type=Path, action="append", default=[], metavar="FILE.jsonl")
    options = parser.parse_args()
    known = {path: top1(options.start, path) for path in options.keep}
    export = [sys.executable, "-m", "export.cli"]
    for history in options.histories:
        older, newer = parts(history, options.judge)
        print(f"{history.stem}: {len(older)} commits to adapt with, {len(newer)} to judge by", flush=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            extra, judges = write(folder / "extra.jsonl", older), write(folder / "judges.jsonl", newer)
            adapted, bundle = folder / "adapted", folder / "bundle"
            train = ["finetune", "--from", str(options.start), "--extra", str(extra), "--out", str(adapted), "--quiet"]
            subprocess.run([*export, *train], check=True, stdout=subprocess.DEVNULL)
            like = ["--like", str(options.start), "--variants", "int8"]
            pack = ["bundle", str(adapted), *like, "--out", str(bundle), "--quiet"]
            subprocess.run([*export, *pack], check=True, stdout=subprocess.DEVNULL)
            for path in (judges, *options.keep):
                before, after = known.get(path) or top1(options.start, path), top1(bundle, path)
                print(f"  {path.stem:<24}n = {before.n:<6}before {before}  after {after}", flush=True)


if __name__ == "__main__":
    main()
