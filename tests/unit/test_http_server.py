"""The thread that speaks HTTP, and the loop that it hands requests to."""

from collections.abc import Callable

import grpc
import pytest

from convoy_service.settings import Settings
from convoy_service.transport.http_server import Reply, Request, Web
from convoy_service.transport.loop import Loop


class Posted(Loop):
    """A loop that keeps what is posted for the test to call."""

    def bind(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        raise NotImplementedError

    def run(self) -> None:
        raise NotImplementedError

    def _wake(self) -> None:
        pass

    @property
    def posted(self) -> list[Callable[[], None]]:
        return list(self._posted)


async def nothing(request: Request) -> Reply:
    return Reply(200, b"{}")


def test_a_bug_of_the_http_thread_ends_the_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Posted()
    web = Web(Settings(), loop, nothing)
    web.bind("127.0.0.1", 0, shared=False)

    async def serve(sockets: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(web._server, "serve", serve)
    web.start()
    web.close(10.0)
    [end] = loop.posted
    with pytest.raises(RuntimeError, match="a bug"):
        end()
    assert "bug in HTTP" in caplog.text
