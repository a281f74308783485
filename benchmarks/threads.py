"""Are the default threads the best ones? One text at a time, and 64 texts, by every setting of this machine.

    python -m benchmarks.threads [BUNDLE ...] [--rounds N] [--busy N] [--json OUT]

Settings run in turn within a round; each figure is the median over rounds of the ratio to the best setting's time in
the same round, so that a machine that slows down slows all of them. With --busy, so many processes compute beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from edge import Bundle, Encoder
from edge.choice import Wish, make_backend, policy, side_by_side
from edge.device import detect
from edge.providers import Candidate

LENGTHS = (4, 12, 48)
MANY = 64


def once(encoder: Encoder, texts: list[str], seconds: float) -> float:
    """Median time of encoding the texts, in milliseconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        started = time.perf_counter()
        encoder.encode(texts)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--busy", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    device = detect()
    print(
        f"{device.cpu}, {device.threads} cores, Python {platform.python_version()}; median of {options.rounds} rounds"
    )
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    try:
        results = measure(options.bundles or [None], options.rounds, device.threads)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    if options.json:
        options.json.write_text(json.dumps({"busy": options.busy, "results": results}, indent=2) + "\n")


def measure(bundles: Sequence[Path | None], rounds: int, cores: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for path in bundles:
        bundle = Bundle.open(path)
        for variant in (v for v in bundle.variants if v.runtime == "onnx"):
            default = next(policy(bundle, Wish(variant=variant.id))).candidate
            settings = [Candidate(variant.id, threads=1)]
            if cores > 1:
                settings += [Candidate(variant.id, threads=cores, spinning=s) for s in (False, True)]
            if default not in settings:
                settings.append(default)
            encoders = {
                str(c): Encoder(bundle, make_backend(bundle, variant, c), side_by_side=side_by_side(c))
                for c in settings
            }
            for tokens in LENGTHS:
                for number in (1, MANY):
                    texts = [" ".join(["word"] * (tokens - 2))] * number
                    times: dict[str, list[float]] = {name: [] for name in encoders}
                    what = f"{bundle.name} {variant.id}, {number} x {tokens}"
                    for _ in tqdm(range(rounds), desc=what, leave=False):
                        for name, encoder in encoders.items():
                            times[name].append(once(encoder, texts, 0.05))
                    middle = {name: statistics.median(values) for name, values in times.items()}
                    best = min(middle, key=lambda name: middle[name])
                    ratio = statistics.median(a / b for a, b in zip(times[str(default)], times[best], strict=True))
                    row = {
                        "bundle": bundle.name,
                        "variant": variant.id,
                        "texts": number,
                        "tokens": tokens,
                        "default": str(default),
                        "best": best,
                        "default_to_best": ratio,
                        "ms": middle,
                    }
                    results.append(row)
                    shown = ", ".join(f"{name.split(', ', 1)[1]} {value:.2f}" for name, value in middle.items())
                    print(f"{what:<36} default/best {ratio:.2f}   ms: {shown}")
    return results


if __name__ == "__main__":
    main()
