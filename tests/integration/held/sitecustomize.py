"""Python imports this as it starts, where this folder is in PYTHONPATH: a run of ONNX Runtime waits for
as long as somebody has locked the file in $HELD that is named as its graph. See `Gate`.
"""

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from onnxruntime import InferenceSession


def _held(run: Callable[..., Any]) -> Callable[..., Any]:
    def wait_and_run(session: InferenceSession, *arguments: Any) -> Any:
        file = Path(os.environ["HELD"]) / session.get_modelmeta().graph_name
        with suppress(FileNotFoundError), file.open() as gate:
            fcntl.flock(gate, fcntl.LOCK_SH)
        return run(session, *arguments)

    return wait_and_run


InferenceSession.run = _held(InferenceSession.run)
InferenceSession.run_with_iobinding = _held(InferenceSession.run_with_iobinding)
