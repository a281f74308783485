"""Measures the ways to run a bundle on this device, and remembers the best of them.

What was measured is kept in ``tuning.json`` in :func:`edge.device.cache_folder`, by bundle, version of ONNX Runtime and
device: elsewhere, or after an update, it does not count.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edge.bundle import Bundle
from edge.choice import LIMIT, TUNING, USES, Choice
from edge.device import cache_folder, detect, usable_cores
from edge.errors import BackendError, InputError, MissingExtra
from edge.providers import Candidate, Installed, installed, options_of
from edge.session import Placement
from edge.trial import BATCH, TOKENS, Trial, run_trial

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured of a bundle on this device.

    Attributes:
        date: When, in UTC.
        trials: All candidates, what failed among them.
        winners: The best candidate by use.
    """

    date: str
    trials: tuple[Trial, ...]
    winners: Mapping[str, Candidate]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "date": self.date,
            "trials": [trial.document() for trial in self.trials],
            "winners": {use: candidate._asdict() for use, candidate in self.winners.items()},
        }

    def table(self) -> str:
        """For people: the winners, all candidates with the quickest first, and what failed and why."""
        good = sorted((t for t in self.trials if t.failure is None), key=_latency)
        width = max(len(str(trial.candidate)) for trial in self.trials)
        columns = [f"{tokens} tok" for tokens in TOKENS] + [f"{BATCH} x {tokens}" for tokens in TOKENS]
        head = "".join(f"{column:>10}" for column in columns)
        lines = [f"{'median ms':<{width}}{head}   load s    MB  cosine  best for"]
        for trial in good:
            times = "".join(f"{trial.p50(tokens, batch):>10.2f}" for batch in (1, BATCH) for tokens in TOKENS)
            size = "-" if trial.rss is None else f"{trial.rss / 1e6:.0f}"
            uses = ", ".join(use for use, best in self.winners.items() if best == trial.candidate)
            rest = f"{trial.load or 0:>9.2f}{size:>6}{trial.cosine or 0:>8.4f}  {uses}"
            lines.append((f"{trial.candidate!s:<{width}}{times}{rest}" + _elsewhere(trial)).rstrip())
        lines += [f"{t.candidate!s:<{width}}  FAILED: {t.failure}" for t in self.trials if t.failure is not None]
        return "\n".join(lines)


def _elsewhere(trial: Trial) -> str:
    placement = Placement(trial.candidate, "", trial.nodes or {})
    total = sum(placement.nodes.values())
    away = total - placement.own()
    return f" ({away} of {total} operations run elsewhere)" if total and away else ""


def candidates(bundle: Bundle, providers: Sequence[Installed]) -> list[Candidate]:
    """What is worth measuring: each variant on the CPU by one thread and by all cores, and on each other provider."""
    cores = usable_cores()
    found = []
    for variant in bundle.variants:
        if variant.runtime != "onnx":
            from edge.coreml import available

            found += [Candidate(variant.id, "coreml")] if available() else []
            continue
        for threads in sorted({1, cores}):
            found.append(Candidate(variant.id, threads=threads))
            if threads > 1:
                found.append(Candidate(variant.id, threads=threads, spinning=True))
    for row in providers:
        if row.name == "cpu" or row.unusable is not None:
            continue
        options = options_of(row, str(cache_of(row.name)))
        for hardware in dict.fromkeys(text.split(" ", 1)[0] for text in row.hardware) or [""]:
            for variant in (v for v in bundle.variants if v.runtime == "onnx"):
                found.append(Candidate(variant.id, row.name, options, hardware, cores))
    return found


def tune(
    bundle: Bundle,
    *,
    seconds: float = 1.0,
    limit: float = LIMIT,
    progress: Callable[[int, int, Candidate], None] | None = None,
) -> Tuning:
    """Measure all candidates, each in a process of its own, and keep the result.

    Args:
        bundle: What to run.
        seconds: How long each length and batch of a candidate is timed; six of them.
        limit: Seconds after which a candidate is stopped.
        progress: Told the number of candidates done, that of all, and what comes next.

    Raises:
        BackendError: Not one candidate runs.
        InputError: The result cannot be kept.
    """
    todo = candidates(bundle, installed())
    trials = []
    for number, candidate in enumerate(todo):
        if progress is not None:
            progress(number, len(todo), candidate)
        trials.append(run_trial(bundle.path, candidate, seconds=seconds, limit=limit))
    good = [trial for trial in trials if trial.failure is None]
    if not good:
        raise BackendError(f"{bundle.path}: nothing runs it here. {trials[0].failure} Run: ruvltra doctor")
    winners = {use: _best(good, _MEASURES[use]) for use in USES}
    tuning = Tuning(datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), tuple(trials), winners)
    _keep(bundle, tuning)
    return tuning


def _best(trials: Sequence[Trial], measure: Callable[[Trial], float]) -> Candidate:
    """The candidate of the lowest measure; of those within 5 % of it the one with the fewest threads, then the CPU."""
    lowest = min(map(measure, trials))
    near = [trial for trial in trials if measure(trial) <= 1.05 * lowest]
    return min(near, key=lambda t: (t.candidate.threads, t.candidate.provider != "cpu", measure(t))).candidate


def _latency(trial: Trial) -> float:
    """Geometric mean of one text's median times."""
    return math.prod(trial.p50(tokens, 1) for tokens in TOKENS) ** (1 / len(TOKENS))


def _throughput(trial: Trial) -> float:
    return math.prod(trial.p50(tokens, BATCH) for tokens in TOKENS) ** (1 / len(TOKENS))


_MEASURES: dict[str, Callable[[Trial], float]] = {
    "latency": _latency,
    "throughput": _throughput,
    "memory": lambda trial: math.inf if trial.rss is None else float(trial.rss),
}


def kept(bundle: Bundle) -> Tuning | None:
    """What was measured of this bundle on this device, by this ONNX Runtime; None if nothing was."""
    entry = _read().get(_key(bundle)) if (cache_folder() / TUNING).is_file() else None
    if entry is None:
        return None
    try:
        trials = tuple(Trial.of(document) for document in entry["trials"])
        winners = {use: trials[number].candidate for use, number in entry["winners"].items()}
        return Tuning(entry["date"], trials, winners)
    except (KeyError, TypeError, ValueError, IndexError):
        return None  # of another version of this package: measured again by the next `ruvltra tune`


def winner(bundle: Bundle, use: str) -> Choice | None:
    """The measured winner for a use, if there is one."""
    tuning = kept(bundle)
    if tuning is None or use not in tuning.winners:
        return None
    return Choice(tuning.winners[use], f"best for {use} of {len(tuning.trials)} measured on {tuning.date[:10]}")


def prove(bundle: Bundle, candidate: Candidate) -> None:
    """Make sure that a candidate runs in a process of its own, where that is not known yet.

    Raises:
        BackendError: It crashes, hangs, fails or is wrong; the message says which.
    """
    tuning = kept(bundle)
    known = () if tuning is None else tuning.trials
    trial = next((t for t in known if t.candidate == candidate and t.failure is None), None)
    if trial is None:
        trial = run_trial(bundle.path, candidate, limit=LIMIT)
        if trial.failure is not None:
            raise BackendError(f"{candidate}: {trial.failure.rstrip('.')}. Use another device, or auto.")
        winners = {} if tuning is None else tuning.winners
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M") if tuning is None else tuning.date
        with contextlib.suppress(InputError):  # where nothing can be kept, it is tried again the next time
            _keep(bundle, Tuning(date, (*known, trial), winners))


def cache_of(provider: str) -> Path:
    """Where a provider may keep what it compiled."""
    return cache_folder() / provider


def _key(bundle: Bundle) -> str:
    return f"{bundle.id} onnxruntime {ort.__version__} device {detect().fingerprint}"


def _read() -> dict[str, Any]:
    try:
        document = json.loads((cache_folder() / TUNING).read_text("utf-8"))
        entries = document["entries"] if document["format"] == _FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _keep(bundle: Bundle, tuning: Tuning) -> None:
    folder = cache_folder()
    positions = {use: [t.candidate for t in tuning.trials].index(best) for use, best in tuning.winners.items()}
    entry = {"date": tuning.date, "trials": [trial.document() for trial in tuning.trials], "winners": positions}
    document = {"format": _FORMAT, "entries": _read() | {_key(bundle): entry}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, prefix=f".{TUNING}.", delete=False, encoding="utf-8"
        ) as stream:
            json.dump(document, stream)
        Path(stream.name).replace(folder / TUNING)
    except OSError as error:
        raise InputError(
            f"{folder / TUNING}: cannot be written ({error}). Make room, or name another folder in RUVLTRA_CACHE."
        ) from None


def draw(tuning: Tuning, path: Path) -> None:
    """Draw latency against memory of all candidates as a PNG, with the line of those that no other beats in both.

    Raises:
        MissingExtra: matplotlib is not installed.
        InputError: The file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("--plot", "bench") from None
    points = [(t.rss / 1e6, _latency(t), t.candidate) for t in tuning.trials if t.failure is None and t.rss is not None]
    front = [p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q[:2] != p[:2] for q in points)]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.add_subplot()
    for provider in dict.fromkeys(candidate.provider for *_, candidate in points):
        own = [(x, y) for x, y, candidate in points if candidate.provider == provider]
        axis.scatter(*zip(*own, strict=True), label=provider)
    line = sorted(point[:2] for point in front)
    axis.plot(*zip(*line, strict=True), color="grey", linewidth=1, label="no other is better in both")
    for x, y, candidate in front:
        axis.annotate(str(candidate), (x, y), textcoords="offset points", xytext=(6, 6), fontsize=8)
    lengths = ", ".join(map(str, TOKENS))
    axis.set(
        xlabel="largest resident memory of the process, MB",
        ylabel=f"one text, ms (median; geometric mean over {lengths} tokens)",
        title=f"measured {tuning.date} UTC",
        ylim=(0, None),
    )
    axis.legend()
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Choose another path for --plot.") from None
