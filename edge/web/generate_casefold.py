"""Writes casefold.js: where Python's ``str.casefold`` differs from JavaScript's ``toLowerCase``.

python edge/web/generate_casefold.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table() -> dict[str, str]:
    """What lower-case characters become when they are folded, where they change."""
    lower = {char: char.casefold() for char in map(chr, range(sys.maxunicode + 1)) if char.lower() == char}
    return {char: folded for char, folded in lower.items() if folded != char}


def source() -> str:
    """The module's text."""
    rows = "".join(f"  {json.dumps(char)}: {json.dumps(folded)},\n" for char, folded in table().items())
    return (
        "// Written by generate_casefold.py: lower-case characters that case folding changes.\n"
        f"export const FOLDED = {{\n{rows}}};\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("casefold.js").write_text(source(), encoding="utf-8")
