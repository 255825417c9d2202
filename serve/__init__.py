"""The server: gRPC services over an engine that batches requests continuously around the jitted decode loop."""
