"""A candidate tried in a process of its own, which may crash or hang without taking anything with it.

The process is `python -m edge.trial`: a request as JSON on standard input, the result as the last line of standard
output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge.bundle import Bundle
from edge.choice import LIMIT, check_golden, golden_bound, make_backend, side_by_side
from edge.encoder import Encoder
from edge.errors import EdgeError
from edge.providers import Candidate, first_line
from edge.session import OnnxBackend, Placement

TOKENS = (4, 12, 48)  # of the texts that are timed
BATCH = 16


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of one call: median and 95th percentile, in milliseconds."""

    tokens: int
    batch: int
    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of a candidate.

    Attributes:
        candidate: What was tried.
        failure: Why it must not be used; None if it may.
        cosine: Lowest cosine to the goldens.
        load: Seconds from the opened bundle to the first vector.
        rss: Largest resident memory of the process, in bytes; None where the system does not say.
        nodes: Operations by provider; empty where that is not known.
        timings: For each length, of one text and of a batch; empty if nothing was timed.
    """

    candidate: Candidate
    failure: str | None = None
    cosine: float | None = None
    load: float | None = None
    rss: int | None = None
    nodes: Mapping[str, int] | None = None
    timings: tuple[Timing, ...] = ()

    def p50(self, tokens: int, batch: int) -> float:
        """Median time in milliseconds; infinite where it was not measured."""
        return next((t.p50 for t in self.timings if (t.tokens, t.batch) == (tokens, batch)), float("inf"))

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"candidate": self.candidate._asdict()}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Trial:
        """The opposite of :meth:`document`."""
        values = dict(document)
        values["candidate"] = Candidate(**values["candidate"])
        values["timings"] = tuple(Timing(**timing) for timing in values["timings"])
        return cls(**values)


def run_trial(
    path: Path,
    candidate: Candidate,
    *,
    seconds: float = 0.0,
    batches: Sequence[int] = (1, BATCH),
    limit: float = LIMIT,
) -> Trial:
    """Try a candidate in a process of its own.

    Args:
        path: The bundle.
        candidate: What to try.
        seconds: How long to time each length and batch; 0 only proves it by the goldens.
        batches: Numbers of texts in a call that is timed.
        limit: Seconds after which the process is killed.
    """
    request = json.dumps(
        {"bundle": str(path), "candidate": candidate._asdict(), "seconds": seconds, "batches": list(batches)}
    )
    # The same modules as here, whatever they were found by.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-m", "edge.trial"]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, check=False, timeout=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return Trial(candidate, f"gave no answer within {limit:g} s and was stopped")
    except OSError as error:
        return Trial(candidate, f"could not be started ({error})")
    try:
        return Trial.of(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, KeyError, IndexError, TypeError):
        lines = done.stderr.strip().splitlines()
        said = f": {lines[-1]}" if lines else ""
        return Trial(candidate, f"its process ended without a result ({_status(done.returncode)}){said}")


def _status(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _try(request: Mapping[str, Any]) -> Trial:
    candidate = Candidate(**request["candidate"])
    try:
        bundle = Bundle.open(request["bundle"])
        variant = bundle.variant(candidate.variant)
        started = time.perf_counter()
        backend = make_backend(bundle, variant, candidate)
        bound = golden_bound(variant, candidate)
        check_golden(backend, variant, bundle, bound)
        load = time.perf_counter() - started
        nodes = backend.nodes() if isinstance(backend, OnnxBackend) else {}
        if nodes and not Placement(candidate, "", nodes).own():
            return Trial(candidate, f"none of {sum(nodes.values())} operations would run on it", nodes=nodes)
        encoder = Encoder(bundle, backend, lengths=variant.lengths, side_by_side=side_by_side(candidate))
        goldens = bundle.goldens()
        vectors = encoder.encode([golden.text for golden in goldens])
        cosine = min((float(v @ g.vector) for v, g in zip(vectors, goldens, strict=True)), default=1.0)
        if not cosine >= bound:
            why = f"its lowest cosine to the goldens is {cosine:.7f}, the bound is {bound}"
            return Trial(candidate, why, cosine, load, nodes=nodes)
        timings = [
            _time(encoder, tokens, batch, request["seconds"])
            for tokens in TOKENS
            for batch in request["batches"]
            if request["seconds"] > 0
        ]
    except EdgeError as error:
        return Trial(candidate, str(error))
    except Exception as error:  # a back end of another package may raise anything
        return Trial(candidate, f"{type(error).__name__}: {first_line(error)}")
    return Trial(candidate, None, cosine, load, _rss(), nodes, tuple(timings))


def _time(encoder: Encoder, tokens: int, batch: int, seconds: float) -> Timing:
    """Texts of so many tokens, special ones included, from text to vector."""
    texts = [" ".join(["word"] * (tokens - 2))] * batch
    for _ in range(3):
        encoder.encode(texts)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        started = time.perf_counter()
        encoder.encode(texts)
        times.append(1000 * (time.perf_counter() - started))
    p50, p95 = np.percentile(times, [50, 95])
    return Timing(tokens, batch, float(p50), float(p95))


def _rss() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def main() -> None:
    """Serve one request."""
    result = json.dumps(_try(json.load(sys.stdin)).document())
    sys.stdout.write(f"\n{result}\n")
    sys.stdout.flush()
    os._exit(0)  # some providers crash when they are taken down


if __name__ == "__main__":
    main()
