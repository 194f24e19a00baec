"""Reads, checks and writes a published version of a model.

Public names: `reader` (bundle, manifest, golden answers, writing), `images` (decoding and resizing),
`reference_statistics` (what the test images look like), `files` (atomic write, lock).
Callers: every package of the server above this one, `convoy_training`, and `convoy`.
"""
