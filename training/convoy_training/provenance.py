"""The versions of the packages that take part in making a version of a model."""

import sys
from importlib import metadata

_PACKAGES = (
    "convoy-serving",
    "tensorflow",
    "keras",
    "tf2onnx",
    "onnx",
    "onnxruntime",
    "numpy",
    "pillow",
)


def provenance() -> dict[str, str]:
    """Python's version, and the version of each package that is installed; for the manifest."""
    made = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            made[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return made
