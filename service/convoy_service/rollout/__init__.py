"""Reads the policy of each model, and judges a canary.

Public names: `policy.Policy`, `canary.Canary`, `canary.judge`, `canary.compare`.
Callers: `lifecycle`, `registry`, `object_store`, `telemetry`, and `convoy models`.
`canary` is pure: it takes counts and returns a decision.
"""
