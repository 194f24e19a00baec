"""Holds the loaded versions of this process, and picks one for each request.

Public names: `registry.Repository`, `registry.Served`, `registry.runs_here`, `shadow_runner.Trials`.
Callers: `api` asks for a version; `lifecycle` and `server` add and remove versions;
`observers` see each answer.
"""
