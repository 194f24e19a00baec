"""Carries rows from frontend processes to engine processes of the same machine.

Public names: `engine_client.Engines`, `engine_client.RemoteBatcher`, `engine_server.EngineServer`,
`engine_server.listen`, `protocol.ModelInfo`.
Callers: `server` starts both sides; `registry` holds a `RemoteBatcher` in the place of a `Batcher`.
`protocol` describes the messages and the shared memory.
"""
