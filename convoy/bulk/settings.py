"""The settings of `convoy bulk`: flag, CONVOY_* variable, default and meaning in one declaration."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from convoy_service.settings import Count, CountOrAuto, ModelsFolder, Positive, Version

_Switch = Annotated[bool, Parameter(negative=())]


@dataclass(frozen=True)
class BulkSettings:
    models: ModelsFolder | None = None
    """Folder of models. Default: ./models if there is one, else the models that come with Convoy."""

    model: str = ""
    """Model to ask; may be left out where there is one only."""

    version: Version = 0
    """Version to ask; 0 takes the one that its versions.toml calls stable, or else the newest."""

    variant: Literal["fp32", "int8", "fp16"] = "fp32"
    """Which of the version's graphs is run."""

    device: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """Where it runs: on CPUs, or on cards, of which each actor has one. auto takes cards where the
    cluster has any."""

    ray_address: str = ""
    """HOST:PORT of a Ray cluster's head, or auto for the one that this machine belongs to. Default:
    RAY_ADDRESS, which Ray's jobs have; where that is not set, Ray is started here, for this job."""

    actors: CountOrAuto = 0
    """Processes that classify, over all machines; 0 takes as many as the cluster has room for when the
    job begins."""

    cpus: CountOrAuto = 0
    """Cores of each actor, for decoding and, on a CPU, for the model; 0 takes one on a CPU, with cards
    each card's share of its cluster's cores."""

    column: str = ""
    """Of Parquet files: the column that has the images, as encoded bytes or as paths. Default: image,
    or else path."""

    key: str = ""
    """Of Parquet files: the column that tells one image from another, and stands beside its answer.
    Default: path; where there is none, the file's name and the number of the row."""

    root: str = ""
    """Of Parquet files with paths: the folder or URL that paths are relative to. Default: where the
    Parquet files are."""

    images_per_file: Count = 1024
    """Images in each file of answers, rounded up to whole batches: what is lost when an actor dies, and
    how finely the work is spread."""

    probabilities: _Switch = False
    """Write the probabilities of all classes, in a column of their own."""

    skip_unreadable: _Switch = False
    """Give images that a store or disk does not hand out even after several tries a row with the error,
    in place of leaving the files that they belong to for the next run."""

    max_megapixels: Positive = 50.0
    """Largest image, in millions of pixels, looked at before it is decoded; the service's default."""

    max_image_mb: Positive = 64.0
    """Largest encoded image, in megabytes (10^6 bytes)."""

    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
    """Print the summary as one JSON object."""
