"""Starts, watches and stops the processes of `convoy serve`.

Public names: `serve.serve`, `supervisor.Supervisor`, `supervisor.work`, `frontend.Acceptor`.
Callers: `convoy serve` calls `serve.serve`. Nothing in the server imports this package.
"""
