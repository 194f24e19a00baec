"""Decides which versions are loaded, and which version answers.

Public names: `manager.Director`, `manager.Alone`, `manager.Refused`.
Callers: `server` alone. The manager watches the models folder and judges canaries.
"""
