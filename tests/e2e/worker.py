"""One machine of several that train together, as tests/e2e/test_distributed.py starts them.

python -m tests.e2e.worker WEIGHTS CHECKPOINTS [DIES_AFTER_EPOCH]
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from convoy_training.data import datasets
from convoy_training.fitting import devices
from convoy_training.fitting import loop as fit
from convoy_training.settings import TrainingSettings


def main() -> int:
    weights, checkpoints, *dies = sys.argv[1:]
    settings = TrainingSettings(
        epochs=3,
        shift=1,
        dropout=0.0,  # which each draws for itself
        optimizer="sgd",
        learning_rate=0.05,
        average=0.9,
        precision="float32",
        checkpoints=Path(checkpoints),
    )
    strategy = devices.prepare(settings.seed)

    def on_epoch(epoch: fit.Epoch) -> None:
        if dies and epoch.epoch == int(dies[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_resume(step: int, steps: int) -> None:
        print(f"resumed at step {step} of {steps}")

    try:
        fitted = fit.fit(
            datasets.load(settings), settings, strategy, on_epoch=on_epoch, on_resume=on_resume
        )
    except devices.TrainingFailed as error:
        print(f"failed: {error}")
        return 1
    np.savez(weights, *fitted.network.get_weights(), allow_pickle=False)
    print(f"chief {fitted.chief}, replicas {fitted.replicas}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
