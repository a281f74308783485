"""Starts processes and says what they took: {"command": [...], "folder": ...} to {"seconds": ..., "peak": bytes}.

A process of its own, run without site packages: the largest memory that Linux states of a process has that of the one
which started it in it, so this one has to be smaller than anything it starts.
"""

import json
import os
import subprocess
import sys
import time


def run(command, folder):
    """Wall time, and the largest resident memory."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return {"error": f"{' '.join(command)} ended with {process.returncode}. Run it to see its message."}
    return {"seconds": seconds, "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


def main():
    print(json.dumps({"load": 0}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
