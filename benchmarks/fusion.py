"""What leaving layer norms unfused brings: the same graph, one session that may fuse them and one that may not.

    python -m benchmarks.fusion [--bundle DIR] [--variant ID]

Both sessions run in turn, one thread, median of 600 runs at each length.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge.bundle import Bundle
from edge.session import NOT_FUSED

_RUNS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="default: the built-in one")
    parser.add_argument("--variant", metavar="ID")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    variant = bundle.variant(options.variant)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    path = bundle.path / variant.model.file
    cpu = ["CPUExecutionProvider"]
    fused = ort.InferenceSession(path, settings, providers=cpu)
    apart = ort.InferenceSession(path, settings, providers=cpu, disabled_optimizers=NOT_FUSED)
    print(f"{bundle.name} {variant.id}, {platform.machine()}, ONNX Runtime {ort.__version__}, one thread")
    for tokens in (4, 12, 48):
        ids = np.random.default_rng(1).integers(1000, 5000, (1, tokens))
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        times: dict[ort.InferenceSession, list[float]] = {fused: [], apart: []}
        for _ in range(_RUNS):
            for session, of_one in times.items():
                started = time.perf_counter()
                session.run(None, feed)
                of_one.append(time.perf_counter() - started)
        pairs = sorted(b / a for a, b in zip(times[fused][50:], times[apart][50:], strict=True))
        low, high = pairs[len(pairs) // 4], pairs[3 * len(pairs) // 4]
        print(
            f"  {tokens:>2} tokens: apart takes {statistics.median(pairs):.2f} of fused's time [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
