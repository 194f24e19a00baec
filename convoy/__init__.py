"""Convoy: train an image classifier, prove its export, serve it in batches over gRPC.

This package is what users import; it needs `protos` and grpcio only.
"""

from convoy.client import AsyncClassifier, Classifier, ClassifierError, Label, Prediction

__all__ = ["AsyncClassifier", "Classifier", "ClassifierError", "Label", "Prediction"]
