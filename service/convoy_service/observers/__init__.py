"""Keeps samples of the traffic for labelling, and detects drift.

Public names: `feedback_writer.keeping`, `feedback_writer.export`, `feedback_writer.delete`,
`drift_monitor.Observer`, `drift_monitor.Watch`.
Callers: `server` connects the observers; `convoy feedback` exports and deletes samples.
"""
