"""Several processes that answer in turn, so that a machine that slows down slows all of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm


class Worker:
    """A process that answers one JSON question a line; its first line says how long it took to load.

    Attributes:
        load: Seconds from its imports to its readiness, by its own word.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command = list(command)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=None if environment is None else {**os.environ, **environment},
        )
        self.load = float(self._read()["load"])

    def ask(self, **wanted: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} ended with {self._process.wait()}; its message is above.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{' '.join(self._command)}: {answer['error']}")
        return answer


def in_turn(
    workers: Mapping[str, Worker], wanted: Mapping[str, Any], rounds: int, title: str
) -> dict[str, list[float]]:
    """Ask every worker the same, round by round, the order turned by one each time.

    A worker answers {"seconds": [...]}; its median is the round's figure.
    """
    found: dict[str, list[float]] = {name: [] for name in workers}
    names = list(workers)
    for number in tqdm(range(rounds), desc=title, leave=False):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(statistics.median(workers[name].ask(**wanted)["seconds"]))
    return found
