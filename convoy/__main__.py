"""The one command: `python -m convoy`, and `convoy` where it is installed."""

import os
import signal
import sys

from convoy.cli.app import app, fail
from convoy.cli.environment import check_environment
from convoy_service import crashes
from convoy_service.errors import ConvoyError


def main() -> None:
    """Runs the command line; exits with its status."""
    crashes.enable()
    if os.getpid() == 1:
        # In a container: the kernel keeps signals that nothing handles from its first process.
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    try:
        check_environment()
        status = app(result_action="return_value") or 0
        sys.stdout.flush()
        raise SystemExit(status)
    except ConvoyError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    # Who read our output, such as `head`, has enough. Python would flush once more as it ends.
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


if __name__ == "__main__":
    main()
