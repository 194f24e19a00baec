"""Reads labelled images, splits them, and checks them.

Public names: `datasets.load`, `datasets.Dataset`, `datasets.Split`, `cache.Cache`, `checks.check`,
`duplicates.near`.
Callers: every package of training above this one, and `convoy check-data`.
"""
