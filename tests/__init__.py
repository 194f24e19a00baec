import convoy_service as convoy_service  # before any of them imports gRPC: it says how that is to poll
