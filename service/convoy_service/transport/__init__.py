"""Receives gRPC and HTTP calls, and runs one handler for each.

Public names: `dispatcher.Front`, `dispatcher.Call`, `grpc_server.server`, `loop.Loop`,
`http_server.Web`, `protobuf_scan.check_parts`.
Callers: `api` registers handlers; `server` starts the transport.
`http_server` imports uvicorn, so callers load it only when HTTP is on.
"""
