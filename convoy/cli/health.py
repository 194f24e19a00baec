"""`convoy health`."""

from pathlib import Path

from convoy.cli.app import app, fail
from convoy.cli.tls import tls_credentials
from convoy_service.settings import Port, Positive


@app.command
def health(
    *,
    server: str = "",
    port: Port = 8001,
    service: str = "convoy.v1.ImageClassifier",
    timeout_s: Positive = 4.0,
    tls_ca: Path | None = None,
) -> int:
    """Ask a server how it is, as gRPC's health service says it: for probes of containers and machines.

    Exits with 0 where it serves, else with 1.

    Parameters
    ----------
    server
        HOST:PORT of the server. Default: --port on this machine.
    port
        Its gRPC port on this machine: the variable is that of `convoy serve`.
    service
        What to ask about: an API or a model by name, whether it can be asked; "" whether the process
        lives, which it also does while it drains.
    timeout_s
        How long to wait for an answer, in seconds.
    tls_ca
        PEM file of the authorities that vouch for a server with TLS, which is then to be named as its
        certificate names it.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from convoy.client import explain

    target = server or f"localhost:{port}"
    # What is asked on this machine has no business at the environment's proxy.
    options = [] if server else [("grpc.enable_http_proxy", 0)]
    credentials = tls_credentials(tls_ca)
    if credentials:
        channel = grpc.secure_channel(target, credentials, options)
    else:
        channel = grpc.insecure_channel(target, options)
    request = health_pb2.HealthCheckRequest(service=service)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            explained = explain(error, target)
            fail(f"{explained.code}: {explained}")
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1
