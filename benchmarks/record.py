"""A benchmark's result: rows that say how and how often they were measured, in a file that names machine and versions.

    {"question", "date", "commit", "quick", "machine", "versions", "notes", "rows": [
        {"case": "12 tokens", "subject": "fastembed", "measure": "p50", "unit": "ms", "value": 4.1, "low": 4.0,
         "high": 4.3, "n": 25, "ratio": 2.9, "ratio_low": 2.8, "ratio_high": 3.1, "better": "lower"}, ...]}

``ratio`` is to the subject named in the notes as the reference, taken round by round in the same run: it is what two
machines, or two days, can be compared by. ``low`` and ``high`` are quartiles of times and
95 % Wilson intervals of shares.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edge.device import cpu_features, detect

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        case: Under which conditions ("12 tokens").
        subject: Of what ("ruvltra-mini int8, route").
        measure: What was measured ("p50", "rss", "accuracy").
        unit: Of value, low and high.
        value: The median, or a share in [0, 1].
        low: Lower quartile, or the interval's lower end; None for what is no sample.
        high: Upper quartile, or the interval's upper end.
        n: Samples: rounds, processes or labelled rows.
        ratio: To the reference in the same rounds; None where there is none.
        ratio_low: Its lower quartile.
        ratio_high: Its upper quartile.
        better: ``lower`` or ``higher``.
    """

    case: str
    subject: str
    measure: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 1
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    better: str = "lower"


def timed(case: str, subject: str, measure: str, unit: str, values: Sequence[float], beside: Sequence[float]) -> Row:
    """The median of one figure a round, and of its ratios to the reference's figure of the same round."""
    ratios = [value / other for value, other in zip(values, beside, strict=True)]
    low, high = quartiles(values)
    ratio_low, ratio_high = quartiles(ratios)
    middle, ratio = statistics.median(values), statistics.median(ratios)
    better = "higher" if unit.endswith("/s") else "lower"
    return Row(case, subject, measure, unit, middle, low, high, len(values), ratio, ratio_low, ratio_high, better)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper; the value itself twice, if there is one only."""
    if len(values) < 2:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return cuts[0], cuts[2]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    device = detect()
    return {
        "cpu": device.cpu,
        "cores": device.threads,
        "instructions": sorted(cpu_features()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions of those that are installed here."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def document(
    question: str, rows: Sequence[Row], *, quick: bool, packages: dict[str, str], notes: Any
) -> dict[str, Any]:
    """A result as it stands in its file."""
    ours = versions(("ruvltra-edge", "onnxruntime", "tokenizers", "numpy"))
    return {
        "question": question,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "quick": quick,
        "machine": machine(),
        "versions": ours | packages,
        "notes": notes,
        "rows": [{key: _short(value) for key, value in asdict(row).items() if value is not None} for row in rows],
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Write it, one row a line, so that a difference between two files can be read."""
    head = {key: value for key, value in result.items() if key != "rows"}
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in result["rows"])
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".partial")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def show(result: dict[str, Any]) -> str:
    """Rows for a terminal, case by case."""
    lines = []
    case = None
    for row in result["rows"]:
        if row["case"] != case:
            case = row["case"]
            lines.append(f"\n{case}")
        spread = f" [{row['low']:g}, {row['high']:g}]" if "low" in row else ""
        ratio = (
            f"  ratio {row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if "ratio" in row else ""
        )
        value = f"{row['value']:g} {row['unit']}{spread}"
        lines.append(f"  {row['subject']:<52} {row['measure']:<11} {value:<32}{ratio}  n = {row['n']}")
    return "\n".join(lines)


def finish(
    question: str, rows: Sequence[Row], options: argparse.Namespace, packages: dict[str, str], notes: Any
) -> None:
    """Print a result, and write it where ``--json`` says."""
    result = document(question, rows, quick=options.quick, packages=packages, notes=notes)
    print(show(result))
    if options.json:
        save(options.json, result)


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> tuple[list[str], int]:
    """What became worse from one result to another of the same question, and how many rows were comparable.

    Times and rates are compared by their ratio to the reference, everything else by its value; a row is worse where
    it has moved by more than ``tolerance`` and the two spreads do not overlap.
    """
    before = {(row["case"], row["subject"], row["measure"]): row for row in old["rows"]}
    worse, compared = [], 0
    for row in new["rows"]:
        known = before.get((row["case"], row["subject"], row["measure"]))
        if known is None:
            continue
        by_ratio = "ratio" in row and "ratio" in known
        if not by_ratio and row["unit"] in ("ms", "s", "texts/s"):
            continue  # of two machines, perhaps
        compared += 1
        prefix = "ratio" if by_ratio else "value"
        sign = 1 if row["better"] == "lower" else -1
        was, now = known[prefix], row[prefix]
        ends = ("ratio_low", "ratio_high") if by_ratio else ("low", "high")
        was_ends = [known.get(end, was) for end in ends]
        now_ends = [row.get(end, now) for end in ends]
        apart = min(now_ends) > max(was_ends) if sign > 0 else max(now_ends) < min(was_ends)
        if sign * (now - was) > tolerance * abs(was) and apart:
            worse.append(f"{row['case']}: {row['subject']}, {row['measure']} {prefix} {was:.3g} -> {now:.3g}")
    return worse, compared


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
