"""Takes docs/playground.png, README's picture, of the page itself in headless Chromium.

python docs/generate_picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.browser import node, served  # noqa: E402
from edge import Bundle  # noqa: E402

TASK = "Fix the null pointer in the login handler"

if __name__ == "__main__":
    with served(Bundle.open(ROOT / "models" / "ruvltra-mini" / "bundle")) as address:
        request = {"address": address, "script": "visit", "task": TASK, "viewport": {"width": 1000, "height": 850}}
        seen = node("page.mjs", request | {"picture": str(ROOT / "docs" / "playground.png")})
    assert seen["complaints"] == [], seen
