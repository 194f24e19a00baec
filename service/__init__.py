"""The server: gRPC in front, ONNX Runtime behind, batches between. Never imports TensorFlow."""
