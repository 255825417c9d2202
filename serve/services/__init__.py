"""The engine over gRPC and HTTP."""
