import service as service  # before any of them imports gRPC: it says how that is to poll
