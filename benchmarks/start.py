"""How soon the command answers and the server is ready, as a whole process, medians of several runs.

python benchmarks/start.py
"""

import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 9
CONVOY = str(Path(sys.executable).parent / "convoy")


def command(*arguments: str) -> float:
    began = time.monotonic()
    subprocess.run([CONVOY, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def python() -> float:
    """The interpreter alone: what no Python program can go below."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.monotonic() - began


def ready() -> float:
    """From the start of `convoy serve` to its line that it is ready, with the shipped model."""
    began = time.monotonic()
    command = [CONVOY, "serve", "--port", "0", "--metrics-port", "0", "--http-port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next((each for each in process.stderr if "ready in" in each), "")
        seconds = time.monotonic() - began
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert line
    return seconds


def main() -> int:
    for name, measure in (
        ("python -c pass", python),
        ("convoy --help", lambda: command("--help")),
        ("convoy train --help", lambda: command("train", "--help")),
        ("convoy serve, ready", ready),
    ):
        measure()  # the first run fills the file cache
        times = sorted(measure() for _ in range(RUNS))
        median = statistics.median(times)
        print(f"{name:22} {median:.2f} s  ({times[0]:.2f} to {times[-1]:.2f})", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
