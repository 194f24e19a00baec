"""Convoy: train an image classifier, prove its export, serve it in batches over gRPC.

This package is what users import; it needs `convoy_protos` and grpcio only.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convoy.client import AsyncClassifier, Classifier, ClassifierError, Label, Prediction

__all__ = ["AsyncClassifier", "Classifier", "ClassifierError", "Label", "Prediction"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line imports this package too, and its --help needs no gRPC.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from convoy import client

    return getattr(client, name)
