"""Chooses what takes calls: grpcio's core, or its public server."""

import logging

import grpc

from convoy_service.transport.grpc_core import CoreServer
from convoy_service.transport.grpc_public import PublicServer
from convoy_service.transport.loop import Loop, Options

log = logging.getLogger("convoy.transport")

# Releases of grpcio, from and below, whose private interface tests/unit/test_transport.py has held
# against the public one.
_TRIED = ((1, 81), (1, 86))


def server(options: Options, public: bool = False) -> Loop:
    """The loop on grpcio's core, or on its public server where `public` asks for that, or where
    the installed grpcio is none that was tried.
    """
    if public:
        return PublicServer(options)
    release = tuple(int(part) for part in grpc.__version__.split(".")[:2])
    if not _TRIED[0] <= release < _TRIED[1]:
        log.warning(
            "grpcio %s was not tried with this release: its public server answers, with a fraction "
            "of the throughput; install grpcio>=%d.%d,<%d.%d",
            grpc.__version__, *_TRIED[0], *_TRIED[1],
        )  # fmt: skip
        return PublicServer(options)
    try:
        return CoreServer(options)
    except (ImportError, AttributeError, TypeError):
        log.warning(
            "grpcio %s is not as expected: its public server answers, with a fraction of the "
            "throughput", grpc.__version__, exc_info=True,
        )  # fmt: skip
        return PublicServer(options)
