"""`convoy serve`."""

from typing import Annotated

from convoy.cli.app import Flat, app, require
from convoy_service.settings import Settings


@app.command
def serve(*, settings: Annotated[Settings, Flat] = Settings()) -> int:
    """Serve every model of a folder over gRPC, in batches, with metrics over HTTP."""
    require("onnxruntime", "cpu", "serving (or [gpu] for a machine with CUDA)")
    if isinstance(settings.models, str):
        require("obstore", "object-store", f"--models {settings.models}")
    if settings.feedback:
        require("pyarrow", "parquet", "--feedback")
    if settings.otlp_endpoint:
        require("opentelemetry.exporter.otlp.proto.http", "tracing", "--otlp-endpoint")
    from convoy_service.server.serve import serve as run

    return run(settings)
