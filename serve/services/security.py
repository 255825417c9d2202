"""Who may call what: TLS from files, and keys in the metadata of calls."""

import hmac
import ssl
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

import grpc

OPEN_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")
"""Services that need no key."""


def server_credentials(certificate: Path, key: Path, clients: Path | None) -> grpc.ServerCredentials:
    """TLS with PEM files.

    Args:
        certificate: The server's, with its chain.
        key: Of the certificate.
        clients: Who must have signed a client's certificate; None: clients need none.

    Raises:
        ValueError: A file cannot be read or is no PEM, or the key is encrypted or not the certificate's.
    """
    pair = (_pem(key, "PRIVATE KEY"), _pem(certificate, "CERTIFICATE"))
    roots = _pem(clients, "CERTIFICATE") if clients else None
    try:  # gRPC itself would say so only in its log, at the first handshake
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ValueError(
            f"{key} is no key of {certificate}: expected the unencrypted private key of its first certificate "
            f"({error.reason})"
        ) from None
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=clients is not None)


def _pem(path: Path, kind: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if kind.encode() not in data or b"-----BEGIN" not in data:
        raise ValueError(f"{path}: expected a PEM file with a {kind}")
    return data


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls through that bring the right key as `authorization: Bearer KEY`.

    Args:
        api_key: For every method; None: those of users are open.
        admin_key: For methods of those who run the server; None: `api_key` is.
        admin_methods: Their full names.
    """

    def __init__(self, api_key: str | None, admin_key: str | None, admin_methods: Collection[str]) -> None:
        self._api, self._admin, self._methods = api_key, admin_key or api_key, frozenset(admin_methods)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Refuse what may not be called."""
        method = str(handler_call_details.method)
        if method.startswith(OPEN_PREFIXES):
            return await continuation(handler_call_details)
        admin = method in self._methods
        wanted = self._admin if admin else self._api
        metadata = dict(handler_call_details.invocation_metadata or ())
        given = str(metadata.get("authorization", "")).removeprefix("Bearer ").strip()
        allowed = [key for key in {wanted, self._admin} if key is not None]
        if wanted is None or any(_equal(given, key) for key in allowed):
            return await continuation(handler_call_details)
        if not given:
            return _refusing(grpc.StatusCode.UNAUTHENTICATED, "a key is needed, as metadata authorization: Bearer KEY")
        if admin and self._api is not None and _equal(given, self._api):
            return _refusing(grpc.StatusCode.PERMISSION_DENIED, f"{method} needs the key of those who run the server")
        return _refusing(grpc.StatusCode.UNAUTHENTICATED, "the key is wrong")


def _equal(given: str, key: str) -> bool:
    """Whether two keys are the same, in a time that does not tell how much of them is."""
    return hmac.compare_digest(given.encode(), key.encode())


def _refusing(code: grpc.StatusCode, message: str) -> grpc.RpcMethodHandler:
    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, message)

    # it reads no message, so it serves methods of every kind
    return grpc.unary_unary_rpc_method_handler(refuse)
