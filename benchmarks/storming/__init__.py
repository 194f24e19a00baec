"""The parts of benchmarks/storm.py: requests and their judge, callers over gRPC and HTTP, an operator,
and the server that all of them use.
"""
