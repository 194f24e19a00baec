"""Mirrors a bucket of an object store into a folder of models.

Public names: `mirror.Store`, `mirror.pull`, `mirror.push`.
Callers: `server`, when `--models` is a URL; `convoy models pull` and `convoy models push`.
The package imports obstore, so callers load it only when they use it.
"""
