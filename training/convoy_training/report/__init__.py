"""Writes the HTML report of a training run.

Public names: `sections.render`, `sections.Record`, `sections.Layer`.
Callers: `pipeline` alone.
"""
