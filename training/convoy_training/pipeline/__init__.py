"""Runs a training job from its settings to its verdict.

Public names: `run.run`, `run.load_test`, `job.train`, `trackers`.
Callers: `convoy train` and `convoy evaluate`. No other package of training imports this one.
"""
