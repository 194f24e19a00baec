"""Test accuracy of a recipe over several seeds: each a whole `convoy train`, gate and all.

python benchmarks/accuracy.py --data digits --seeds 5
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convoy_service.artifacts import reader as bundles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    arguments, flags = parser.parse_known_args()
    found = []
    for seed in range(arguments.seeds):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as models:
            command = ["train", "--data", arguments.data, "--models", models, "--seed", str(seed)]
            subprocess.run(
                [sys.executable, "-m", "convoy", *command, *flags],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            (name,) = bundles.names(Path(models))
            manifest = bundles.read(Path(models) / name / "1").manifest
        assert manifest.scores is not None
        assert manifest.parity is not None
        found.append(manifest.scores.accuracy)
        print(
            f"seed {seed}: accuracy {manifest.scores.accuracy:.4f} "
            f"({manifest.scores.correct} of {manifest.scores.images}), "
            f"parity {manifest.parity.max_abs_difference:.1e}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    print(f"mean {statistics.mean(found):.4f}, standard deviation {spread:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
