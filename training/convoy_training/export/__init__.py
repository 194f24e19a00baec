"""Converts networks to ONNX: trained ones, smaller variants, and files from elsewhere.

Public names: `to_onnx.to_onnx`, `quantization.clean`, `quantization.int8`, `quantization.fp16`,
`import_onnx.add`.
Callers: `pipeline` and `convoy models add`. `to_onnx` imports TensorFlow.
"""
