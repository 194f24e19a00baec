"""`convoy bulk`."""

from typing import Annotated

from convoy.bulk.settings import BulkSettings
from convoy.cli.app import Flat, app, require


@app.command
def bulk(
    images: str, to: str, /, *, settings: Annotated[BulkSettings, Flat] = BulkSettings()
) -> int:
    """Classify stored images, however many, on one machine or a Ray cluster; write Parquet.

    One row for each image, those too that can't be read. A job that was broken off goes on where it
    was when it is run again. Exits with 1 where files of answers are missing in the end.

    Parameters
    ----------
    images
        Folder of images or of Parquet files, or one Parquet file: a path that all machines see, or
        s3://bucket/prefix, gs://bucket/prefix or abfs://container@account.dfs.core.windows.net/prefix.
    to
        Folder for the answers, likewise.
    """
    require("onnxruntime", "cpu", "classifying (or [gpu] for machines with CUDA)")
    require("ray", "bulk", "classifying in bulk")
    from convoy.bulk.run import run

    return run(images, to, settings)
