"""Runs rows in batches on one device.

Public names: `batcher.Batcher`, `onnx_model.Model`, `session` (devices and sessions),
`isolated_verifier.prove`, `cpu` (usable cores), `gpu` (the card's metrics).
Callers: `ipc`, `registry`, `lifecycle` and `server`; `convoy_training` and `convoy bulk` use the model.
`batcher` depends neither on gRPC nor on ONNX Runtime.
"""
