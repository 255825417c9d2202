"""Protocols of the services and the stubs generated from them (`make protos`)."""
