"""Channels to other services: one per address, with keepalive, quick reconnects and finite messages."""

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from zipserve.common.errors import DeadlineError
from zipserve.common.rpc import Context
from zipserve.common.rpc.door import ClusterTokens
from zipserve.common.rpc.tls import Certificates
from zipserve.common.settings import ServiceSettings

# Calls that may be repeated without harm; the router replays Prefill and Decode by itself.
_RETRIED = [{"service": f"zipserve.v1.{name}"} for name in ("KvTransferService", "KvStoreService", "WorkerService")]
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": _RETRIED,
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.05s",
                "maxBackoff": "0.5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


_LAST_CALLS_S = 600.0
"""How long calls may take on a channel that is closed because its certificates are old."""


class ChannelPool:
    """Open channels by address. Close it at the end, or use it as an async context manager.

    Args:
        tokens: signs every call, as the services of a cluster want it. None: calls go out as they are.
        certificates: for TLS. When they are exchanged, channels are made anew; calls end on the old ones.
        tls_name: that the other side's certificate must have. Empty: the host of its address.
    """

    def __init__(
        self,
        message_bytes_max: int,
        tokens: ClusterTokens | None = None,
        certificates: Certificates | None = None,
        tls_name: str = "",
    ) -> None:
        self._tokens = tokens
        self._certificates = certificates
        self._generation = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._options = [
            ("grpc.max_receive_message_length", message_bytes_max),
            ("grpc.max_send_message_length", message_bytes_max),
            ("grpc.enable_http_proxy", 0),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 2_000),  # whatever its name says: the time for one attempt
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ]
        if tls_name:
            self._options.append(("grpc.ssl_target_name_override", tls_name))
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._former: dict[str, grpc.aio.Channel] = {}
        """Of the certificates before; who has a stub of one goes on with it."""

    @classmethod
    def within(cls, settings: ServiceSettings) -> "ChannelPool":
        """To other services of one's own cluster."""
        certificates = Certificates(settings.tls) if settings.tls else None
        tokens = ClusterTokens(settings.secret_bytes)
        return cls(settings.message_bytes_max, tokens, certificates, settings.tls_name)

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to host:port; connecting happens on first use."""
        if self._certificates is not None:
            self._exchange(self._certificates)
        if address not in self._channels:
            if self._certificates is None:
                channel = grpc.aio.insecure_channel(address, options=self._options)
            else:
                channel = grpc.aio.secure_channel(
                    address, self._certificates.channel_credentials(), options=self._options
                )
            self._channels[address] = channel if self._tokens is None else _signed(channel, self._tokens)
        return self._channels[address]

    def _exchange(self, certificates: Certificates) -> None:
        """Puts the channels aside if their certificates are not those of now."""
        certificates.refresh()
        if certificates.generation == self._generation:
            return
        self._generation = certificates.generation
        for channel in self._former.values():
            task = asyncio.create_task(channel.close(_LAST_CALLS_S), name="close-channel")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._former, self._channels = self._channels, {}

    async def close(self) -> None:
        """Closes all channels; calls under way are cancelled."""
        channels = [*self._channels.values(), *self._former.values()]
        self._channels, self._former = {}, {}
        for task in self._closing:
            task.cancel()
        for channel in channels:
            await channel.close()

    async def __aenter__(self) -> "ChannelPool":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _signed(channel: grpc.aio.Channel, tokens: ClusterTokens) -> grpc.aio.Channel:
    """The channel, with a token in the metadata of every call. gRPC's own interceptors would do the same in tasks of
    their own, which costs more than the call."""

    def signing(make: Callable[..., Any]) -> Callable[..., Any]:
        def of_method(method: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
            call = make(method, *args, **kwargs)

            def signed(request: Any, *, metadata: Iterable[tuple[str, str]] | None = None, **how: Any) -> Any:
                return call(request, metadata=(*(metadata or ()), tokens.metadata(method)), **how)

            return signed

        return of_method

    channel.unary_unary = signing(channel.unary_unary)  # type: ignore[method-assign]
    channel.unary_stream = signing(channel.unary_stream)  # type: ignore[method-assign]
    return channel


class Deadline:
    """A point in time that all waits of a request count down to."""

    def __init__(self, seconds: float) -> None:
        self.at_s = time.monotonic() + seconds

    @classmethod
    def of(cls, context: Context, default_s: float) -> "Deadline":
        """The deadline of an incoming call; `default_s` from now when the caller set none."""
        remaining: float | None = context.time_remaining()  # None when there is no deadline, whatever the stubs say
        return cls(default_s if remaining is None else min(remaining, default_s))

    def remaining_s(self, at_most_s: float = float("inf")) -> float:
        """Seconds left, at most `at_most_s`.

        Raises:
            DeadlineError: none are left.
        """
        left = self.at_s - time.monotonic()
        if left <= 0:
            raise DeadlineError("the deadline has passed")
        return min(left, at_most_s)
