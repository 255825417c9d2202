"""The seed of a request that brings none."""

import hashlib


def derived_seed(seed: int, request_id: str) -> int:
    """A seed below 2^32 that the server's own and the request's id decide, so that a run can be repeated."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{request_id}".encode()).digest()[:4], "big")
