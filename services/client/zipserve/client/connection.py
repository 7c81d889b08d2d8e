"""How a router is reached: address, encryption, key. Shared by both clients."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

from zipserve.client.retry import ONCE, Retry
from zipserve.common.errors import ZipserveError
from zipserve.common.rpc.status import FailedCall, from_rpc_error

_LOCAL_HOSTS = ("127.", "localhost:", "[::1]:")
_REQUEST_ID_KEY = "x-request-id"


@dataclass(frozen=True)
class Tls:
    """Encryption of a connection, in PEM."""

    roots: bytes | None = None
    """Authorities that the server's certificate is checked against. None: those that gRPC comes with."""
    certificate: bytes | None = None
    """The client's own, where the server asks for one; with the key."""
    key: bytes | None = None
    name: str = ""
    """In the server's certificate. Empty: the address's host."""

    @classmethod
    def read(
        cls,
        roots: Path | str | None = None,
        certificate: Path | str | None = None,
        key: Path | str | None = None,
        name: str = "",
    ) -> "Tls":
        """Reads the files.

        Raises:
            OSError: one cannot be read.
        """
        pems = [None if path is None else Path(path).read_bytes() for path in (roots, certificate, key)]
        return cls(pems[0], pems[1], pems[2], name)

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC takes them."""
        return grpc.ssl_channel_credentials(self.roots, self.key, self.certificate)


@dataclass(frozen=True)
class Connection:
    """What all calls of a client have in common."""

    address: str
    """host:port."""
    api_key: str = ""
    """Sent with every call. Empty: none."""
    tls: Tls | None = None
    """None: not encrypted."""
    retry: Retry = ONCE
    message_bytes_max: int = 4 << 20
    """Largest message, in bytes."""

    def options(self) -> list[tuple[str, int | str]]:
        """Of the channel."""
        options: list[tuple[str, int | str]] = [
            ("grpc.max_receive_message_length", self.message_bytes_max),
            ("grpc.max_send_message_length", self.message_bytes_max),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # http_proxy is not meant for this machine itself, whether no_proxy says so or not.
            ("grpc.enable_http_proxy", int(not self.address.startswith(_LOCAL_HOSTS))),
        ]
        if self.tls and self.tls.name:
            options.append(("grpc.ssl_target_name_override", self.tls.name))
        return options

    def metadata(self, request_id: str = "") -> tuple[tuple[str, str], ...]:
        """Of a call."""
        pairs: Mapping[str, str] = {
            "authorization": f"Bearer {self.api_key}" if self.api_key else "",
            _REQUEST_ID_KEY: request_id,
        }
        return tuple((key, value) for key, value in pairs.items() if value)


def typed(error: grpc.RpcError) -> ZipserveError:
    """The error of a call as one of ours, which tells gRPC's as its cause."""
    ours = from_rpc_error(cast(FailedCall, error))
    ours.__cause__ = error
    return ours
