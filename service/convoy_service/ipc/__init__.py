"""The way of rows from acceptor processes to engine processes of the same machine (Linux).

An acceptor has one Unix stream socket and one shared memory (an unnamed `memfd`, so nothing is left
behind by a killed process) for each engine. Pixels travel in the shared memory alone; small fixed
records over the socket say where they lie, and the answers take the place of the pixels:

    acceptor -> engine   hello: magic, protocol; with the shared memory as a file descriptor
    engine -> acceptor   welcome: magic, protocol; with the status page as a file descriptor
    acceptor -> engine   submit or cancel: number, deadline, offset, priority, rows, model, kind
    engine -> acceptor   reply: number, run_s, retry_after_s, batch_size, failed_rows, status;
                         or news: the same record, to no request: what it serves has changed

Each submit has exactly one reply, also after a cancel; until then its block is not used again, so
rows can't be mixed. The status page holds what the engine serves, as JSON, and how much there is to
do, which the engine keeps up to date: an acceptor refuses before it copies anything. Each model that
an engine comes to serve has a number that no other gets while the engine lives, so that a request
can't meet another model than it was meant for; one that is gone is answered NotReady.

A pixel is copied once more than in one process: into the shared memory. No side ever waits for the
other to read: what a full socket does not take is kept, and sent when there is room. All times are
on `time.monotonic`'s clock, which the processes of a machine share.
"""

from service.channel.acceptor import Engines, RemoteBatcher, RemoteTicket
from service.channel.engine import EngineServer, Hosted, listen
from service.channel.protocol import ModelInfo

__all__ = [
    "EngineServer",
    "Engines",
    "Hosted",
    "ModelInfo",
    "RemoteBatcher",
    "RemoteTicket",
    "listen",
]
