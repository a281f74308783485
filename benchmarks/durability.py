"""Does the memory store lose anything? Kills its writer again and again, and searches while it is written.

python -m benchmarks.durability --kills 300 --seconds 60
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from edge import MemoryStore

ROOT = Path(__file__).resolve().parents[1]
DIM = 32

# Writes records in pairs, one transaction each; changes some, deletes some, compacts; says what is done.
_WRITER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from edge import MemoryStore
from benchmarks.durability import pair, vector
start, seconds = int(sys.argv[3]), float(sys.argv[4])
end = time.monotonic() + seconds
with MemoryStore(sys.argv[2], compact_at=60) as store:
    print("ready", flush=True)
    i = start
    while time.monotonic() < end:
        store.add_many(pair(i, 0))
        print("w", i, 0, flush=True)
        if i % 4 == 3:
            store.add_many(pair(i - 1, 1), replace=True)
            print("w", i - 1, 1, flush=True)
        if i % 5 == 4:
            print("d?", i - 3, flush=True)
            store.delete_where({"pair": i - 3})
            print("d", i - 3, flush=True)
        i += 1
"""

# Searches, and checks that both records of a pair are there, of the same version.
_READER = """
import sys, time, warnings
warnings.simplefilter("error")
sys.path.insert(0, sys.argv[1])
from edge import MemoryStore
from benchmarks.durability import vector
end = time.monotonic() + float(sys.argv[3])
searches = 0
with MemoryStore(sys.argv[2], create=False) as store:
    while time.monotonic() < end:
        hits = store.search(vector(searches), 6, mode="dense")
        for hit in hits:
            number = hit.record.metadata["pair"]
            both = store.search(vector(number), 4, mode="dense", where={"pair": number})
            versions = [match.record.metadata["version"] for match in both]
            assert len(versions) in (0, 2), (number, versions)
            assert len(set(versions)) <= 1, (number, versions)
            searches += 1
        found = store.search(f"record {searches}", 3, mode="text")
        searches += 1
print(searches)
"""


def vector(number: int) -> Any:
    row = np.random.default_rng(number).normal(size=DIM)
    return row / np.linalg.norm(row)


def pair(number: int, version: int) -> list[dict[str, Any]]:
    """Two records that are only ever written together."""
    return [
        {
            "text": f"record {number} version {version} {side}",
            "id": f"{number}-{side}",
            "vector": vector(number),
            "metadata": {"pair": number, "version": version},
        }
        for side in ("a", "b")
    ]


def kill_again_and_again(folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill the writer at random moments; check every record that was acknowledged before."""
    choose = random.Random(seed)
    written: dict[int, int] = {}
    deleted: set[int] = set()
    lost, halves, acknowledged = [], [], 0
    for kill in tqdm(range(kills), desc="kills", unit=""):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(ROOT), str(folder), str(kill * 100_000), "60"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        if choose.random() < 0.8:  # else while it still opens the store
            process.stdout.readline()
        time.sleep(choose.uniform(0, 0.4))
        process.kill()
        lines = process.stdout.read().split("\n")[:-1]
        process.wait()
        process.stdout.close()
        begun = set()
        for line in lines:
            words = line.split()
            if words[0] == "w":
                written[int(words[1])] = int(words[2])
                acknowledged += 1
            elif words[0] == "d?":
                begun.add(int(words[1]))
            elif words[0] == "d":
                deleted.add(int(words[1]))
                written.pop(int(words[1]), None)
                acknowledged += 1
        with MemoryStore(folder, compact_at=None) as store:
            there: dict[int, list[int]] = {}
            for record, row in store.records():
                number = record.metadata["pair"]
                there.setdefault(number, []).append(record.metadata["version"])
                if not np.allclose(row, vector(number), atol=1e-6):
                    lost.append(number)
        for number, version in written.items():
            versions = there.get(number, [])
            # A deletion that was begun may have been done, a change that was begun likewise.
            if not versions and number in begun:
                continue
            if len(versions) != 2 or min(versions) < version:
                lost.append(number)
        lost += [number for number in deleted if number in there]
        halves += [number for number, versions in there.items() if len(versions) != 2 or len(set(versions)) != 1]
        for number in begun & set(written) - set(there):
            written.pop(number)
    with MemoryStore(folder) as store:
        store.compact()
        searchable = sum(bool(store.search(vector(number), 1, mode="dense")) for number in list(written)[:200])
    return {
        "kills": kills,
        "acknowledged": acknowledged,
        "lost": len(lost),
        "halves": len(halves),
        "records": len(written) * 2,
        "searchable": f"{searchable} of {min(200, len(written))}",
    }


def concurrent(folder: Path, seconds: float, readers: int = 4) -> dict[str, Any]:
    """One process writes, changes, deletes and compacts; others search all the while and check what they see."""
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(ROOT), str(folder), "0", str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _READER, str(ROOT), str(folder), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(readers)
    ]
    segments: set[str] = set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        segments |= {path.name for path in (folder / "segments").glob("[0-9]*")}
        time.sleep(0.02)
    outputs = [process.communicate() for process in processes]
    writes = writer.communicate()[0].split("\n")
    errors = [error for _, error in outputs if error]
    if writer.returncode:
        errors.append(f"writer: {writer.returncode}")
    return {
        "seconds": seconds,
        "readers": readers,
        "writes": len(writes) - 1,
        "searches": sum(int(output) for output, error in outputs if not error),
        "compactions": len(segments),
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill_again_and_again(Path(folder) / "killed", options.kills)))
        print(json.dumps(concurrent(Path(folder) / "shared", options.seconds)))


if __name__ == "__main__":
    main()
