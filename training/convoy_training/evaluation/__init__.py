"""Scores answers, fits the calibration, and chooses the thresholds.

Public names: `scores.score`, `scores.evaluate`, `scores.fit_scaling`, `scores.mcnemar`.
Callers: `pipeline`, `report`, `release`, `fitting`, `export`, and `convoy evaluate`.
"""
