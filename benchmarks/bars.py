"""A result's ratios as bars in a terminal."""

from __future__ import annotations

import math
from typing import Any

WIDTH = 40


def bars(result: dict[str, Any]) -> str:
    """One bar a row that has a ratio, as long as the ratio's logarithm above the smallest of its case."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row.get("ratio", 0) > 0:
            cases.setdefault(f"{row['case']}, {row['measure']}", []).append(row)
    lines = []
    for case, rows in cases.items():
        logs = [math.log(row["ratio"]) for row in rows]
        lowest, span = min(logs), max(max(logs) - min(logs), 1e-9)
        lines.append(f"\n{case}: ratio, on a logarithmic scale; {rows[0]['better']} is better")
        for row, log in sorted(zip(rows, logs, strict=True), key=lambda pair: pair[1]):
            bar = "█" * (1 + round((WIDTH - 1) * (log - lowest) / span))
            lines.append(f"  {row['subject']:<52} {row['ratio']:>9.3g} {bar}")
    return "\n".join(lines)
