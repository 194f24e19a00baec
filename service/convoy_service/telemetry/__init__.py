"""Counts events, exports them to Prometheus, and traces requests.

Public names: `counters.Metrics`, `counters.merge`, `tracing.Tracing`, `tracing.Trace`.
Callers: every package of the server above this one.
`tracing` imports OpenTelemetry, so callers load it only when tracing is on.
"""
