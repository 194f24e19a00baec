"""Builds the network and trains it.

Public names: `loop.fit`, `loop.Fitted`, `loop.Epoch`, `networks.build`.
Callers: `pipeline` alone. The package imports TensorFlow, so callers load it only when they train.
"""
