"""Translates the public protocols into calls on the registry.

Public names: `classifier.ClassifierRpc`, `inference.InferenceRpc`, `rest.Rest`, `health.Health`,
`control.Order`, `shared_memory.SharedMemory`.
Callers: `server` alone. A handler reads a request, calls the registry and writes the answer.
"""
