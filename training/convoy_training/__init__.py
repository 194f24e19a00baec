"""From labelled images to a published version.

Packages, highest layer first: `pipeline`, `report`, `release` beside `fitting` and `export`,
`evaluation`, `data`; then the module `settings`. A package imports lower layers only.
Callers: `convoy train`, `convoy evaluate`, `convoy check-data` and `convoy models add`.
Only `fitting` and `export.to_onnx` need TensorFlow.
"""
