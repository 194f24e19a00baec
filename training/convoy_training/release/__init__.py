"""Examines an exported network, applies the gate, and publishes a version.

Public names: `publish.examine`, `publish.judge`, `publish.publish`, `publish.Check`.
Callers: `pipeline` and `report`.
"""
