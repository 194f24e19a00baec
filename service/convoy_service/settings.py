"""The settings of `convoy serve`: flag, CONVOY_* variable, default and meaning in one declaration.

Only the command line reads the environment; everything else is handed a `Settings`.
"""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, Token
from cyclopts.validators import Number

# The names by which files in a folder are taken for images; bytes are judged by what they hold.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})

Count = Annotated[int, Parameter(validator=Number(gte=1))]
CountOrAuto = Annotated[int, Parameter(validator=Number(gte=0))]
Positive = Annotated[float, Parameter(validator=Number(gt=0))]
Seconds = Annotated[float, Parameter(validator=Number(gte=0))]
Share = Annotated[float, Parameter(validator=Number(gte=0, lte=1))]
# A protobuf uint32 and uint64 hold these and more; so many labels or versions nobody has.
Labels = Annotated[int, Parameter(validator=Number(gte=1, lt=2**31))]
Version = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))]
Port = Annotated[int, Parameter(validator=Number(gte=0, lte=65535))]


def _known(_: object, device: str) -> None:
    if not re.fullmatch(r"auto|cpu|(cuda|tensorrt)(:\d+)?", device, re.ASCII):
        raise ValueError(f"no device {device!r}: auto, cpu, cuda, cuda:N, tensorrt or tensorrt:N")


def _folder_or_url(_: object, tokens: Sequence[Token]) -> Path | str:
    text = tokens[0].value
    scheme, found, rest = text.partition("://")
    if not found:
        return Path(text)
    if scheme not in URL_SCHEMES or not rest.strip("/"):
        raise ValueError(f"{text!r}: a folder, or a URL as s3://, gs:// or az://bucket/prefix")
    # One name for one place: it also names the cache.
    return text.rstrip("/")


def _no_url(_: object, folder: Path) -> None:
    if str(folder).partition(":/")[0] in URL_SCHEMES:
        raise ValueError(
            "of an object store only `convoy serve` takes the URL; here, a folder: see `convoy models "
            "pull` and `push`"
        )


def _http(_: object, url: str | None) -> None:
    if url and not re.match(r"https?://[^/]", url):
        raise ValueError(f"{url!r}: a URL as http://collector:4318")


OtlpEndpoint = Annotated[str, Parameter(validator=_http)]

# A `str` is the URL of a place in an object store.
URL_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
FolderOrUrl = Annotated[Path | str, Parameter(converter=_folder_or_url)]
ModelsFolder = Annotated[Path, Parameter(validator=_no_url)]


@dataclass(frozen=True)
class Settings:
    models: FolderOrUrl | None = None
    """Folder of models, or s3://bucket/prefix (gs://, az://), of which a folder is kept as a copy
    (docs/object-store.md); every model in it is served. Default: ./models if there is one, else the
    models that come with Convoy."""

    models_cache: Path | None = None
    """With models in an object store: where the folders are that copies of them are kept in. Default:
    ~/.cache/convoy/models."""

    store_watch_s: Positive = 5.0
    """How often, in seconds, the object store is asked what it has."""

    store_versions: Count = 3
    """How many of each model's newest versions are kept of an object store, beside those that its
    versions.toml names."""

    host: str = "0.0.0.0"
    """Address to listen on, for gRPC and HTTP."""

    port: Port = 8001
    """gRPC port; 0 takes a free one."""

    http: bool = True
    """Answer HTTP, too: the Open Inference Protocol's REST form, and /v1/classify (docs/http.md). With
    --no-http there is gRPC alone."""

    http_port: Port = 8000
    """HTTP port; 0 takes a free one."""

    metrics_port: Port = 8002
    """HTTP port of /metrics, /healthz and /readyz; 0 takes a free one."""

    metrics_compat: Literal["none", "triton"] = "none"
    """By whose names /metrics also tells what it counts, beside our own: triton (nv_inference_*), so
    that boards made for it draw (docs/metrics.md)."""

    device: Annotated[str, Parameter(validator=_known)] = "auto"
    """Where models run: auto, cpu, cuda or tensorrt; with cuda:N or tensorrt:N on card N. auto takes
    CUDA where it works, else the CPU, and says so; the others refuse to start where they can't be
    had. With several processes and no N, each takes the next card."""

    variant: Literal["fp32", "int8", "fp16", "fastest"] = "fp32"
    """Which graph of a version is served; one that has no such variant is served in fp32. fastest
    takes the one whose speed-up, in the manifest, was the highest on a device of this kind; should
    that not give its golden answers here, fp32, and says so. A variant asked for by name that does
    not give them is refused with its version."""

    gpu_memory_mb: Annotated[float, Parameter(validator=Number(gte=0))] = 0.0
    """Megabytes of a card's memory that a model may take for each of its batch sizes, which have a
    session each; 0 for no bound."""

    cuda_graphs: bool = False
    """On a card (cuda, not tensorrt): record what it does for each batch size, and repeat that in one
    go, which spares small batches most of what starting each operation costs. One batch is then on
    its way at a time. A model that can't be recorded runs without, and the log says why."""

    acceptors: Count = 1
    """Processes that take calls and decode images, all on the one port."""

    engines: CountOrAuto = 0
    """Processes that run batches, to which acceptors hand pixels through shared memory; 0 means that
    each acceptor runs its own."""

    run_threads: CountOrAuto = 0
    """Threads that ONNX Runtime uses for one batch on a CPU; 0 means one for each usable core."""

    decode_threads: CountOrAuto = 0
    """Threads that decode images; 0 means one for each usable core."""

    max_request_mb: Positive = 64.0
    """Largest request body, in megabytes (10^6 bytes)."""

    max_megapixels: Positive = 50.0
    """Largest image, in millions of pixels, looked at before it is decoded."""

    max_images: Count = 4096
    """Most images in one request; larger sets are for several requests, or a stream."""

    max_in_flight: Count = 4096
    """Requests taken on at once; more are refused with RESOURCE_EXHAUSTED."""

    max_held_mb: Positive = 512.0
    """Megabytes of requests, and of the pixels decoded from them, that are worked on at once; more
    are refused with RESOURCE_EXHAUSTED."""

    max_wait_s: Positive = 10.0
    """How long a request may be expected to wait for the device; longer, and it is refused with
    RESOURCE_EXHAUSTED. One with a deadline is refused as soon as that can't be kept."""

    max_connection_age_s: Seconds = 0.0
    """How long a connection is kept, give or take a tenth of it by chance, so that not all go at once:
    what is under way on it is finished, and the client's next calls make a new one, which may be to a
    server that has come since (docs/deploy.md). 0: for ever."""

    watch_s: Seconds = 1.0
    """How often the models folder is looked at for new versions and changed policies (versions.toml);
    0: only at the start, and for orders."""

    rollback_window_s: Seconds = 300.0
    """How long a version that was replaced is kept in memory, for a way back at once."""

    deterministic: bool = False
    """Run every batch at the largest size, so that equal pixels give equal bits whatever else is in
    the batch. Costs throughput where batches are not full."""

    front: Literal["core", "public"] = "core"
    """What takes calls: one loop on grpcio's core, or grpcio's public threaded server, with a
    fraction of the throughput. Releases of grpcio that were not tried get the public one."""

    allow_repository_control: bool = False
    """Take orders over gRPC: which versions are served (RepositoryModelLoad, RepositoryModelUnload,
    and ModelControl, which `convoy models --server` uses). Whoever can call can then give them."""

    allow_shared_memory: bool = False
    """Let callers of this machine hand over inputs, and take outputs, in POSIX shared memory
    (SystemSharedMemoryRegister). Whoever can call can then have the server read and write all that its
    user may in /dev/shm."""

    feedback: Path | None = None
    """Folder in which images and their answers are kept, to be labelled and trained on: all that were
    answered as unsure, and a share of the others. Off where none is named; needs pyarrow. Read
    docs/feedback.md before you keep what is not yours."""

    feedback_share: Share = 0.01
    """Share of requests, chosen by chance, whose images are kept though they are not unsure."""

    feedback_mb: Positive = 1000.0
    """Megabytes (10^6 bytes) that the feedback folder may have: beyond, the oldest is deleted."""

    feedback_rotate_s: Positive = 60.0
    """How long an image may wait in memory until a file is written; sooner where many wait."""

    drift_images_per_s: Annotated[float, Parameter(validator=Number(gte=0))] = 100.0
    """Images a second, of each version in each process, that are held against the version's training
    profile (docs/drift.md); 0 for none."""

    drift_window: Count = 1000
    """Images that are compared with the profile at a time; more where there are over 100 classes, ten
    for each."""

    drift_psi: Positive = 0.2
    """Population stability index from which on a feature alarms, where chance does not explain it."""

    otlp_endpoint: OtlpEndpoint | None = None
    """Where traces of requests are sent, by OTLP over HTTP: http://collector:4318 (docs/tracing.md). Off
    where none is named; needs OpenTelemetry, whose own variables, as OTEL_TRACES_SAMPLER, say the
    rest."""

    tls_certificate: Path | None = None
    """PEM file of the server's certificate chain: gRPC and HTTP are then served over TLS, the metrics
    are not."""

    tls_key: Path | None = None
    """PEM file of its private key."""

    tls_client_ca: Path | None = None
    """PEM file of the authorities whose clients may call: others are refused."""

    shutdown_delay_s: Seconds = 5.0
    """After SIGTERM, how long new requests are still answered while load balancers notice that
    readiness is withdrawn. SIGINT (Ctrl-C) skips it."""

    drain_grace_s: Seconds = 20.0
    """After that, how long requests in flight may take to finish."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages that are logged, to standard error."""

    def delay_s(self, number: int) -> float:
        """How long a signal leaves before draining: Ctrl-C none."""
        return self.shutdown_delay_s if number == signal.SIGTERM else 0.0


def default_models() -> Path:
    """`./models` where there is one, else the models that come with Convoy."""
    local = Path("models")
    if local.is_dir() and not _is_code(local):
        return local
    here = Path(__file__).resolve().parent
    # In a checkout this file is service/convoy_service/settings.py, and models/ is beside service/.
    installed, checkout = here / "models", here.parent.parent / "models"
    return installed if installed.is_dir() else checkout


def _is_code(folder: Path) -> bool:
    """Whether `folder` is a Python package of the user's project, and holds no version of a model."""
    return (folder / "__init__.py").is_file() and not any(folder.glob("*/*/manifest.json"))
