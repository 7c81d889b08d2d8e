"""Who may call a server.

The services inside a cluster know each other by its secret: every call carries a token, the HMAC of its method and time
under that secret. A token that somebody has overheard is good for one method and a few minutes; without TLS nothing
keeps others from reading along.
"""

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from zipserve.common.errors import UnauthenticatedError
from zipserve.common.rpc.tls import Certificates
from zipserve.common.settings import ServiceSettings

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]
TOKEN_KEY = "x-zipserve-token"  # noqa: S105  the name of a header
_VALID_S = 300.0
"""How far a token's time may lie off: clocks of different machines do."""
_FRESH_S = 30.0
"""How long the same token is sent."""


class Door(Protocol):
    """Lets calls in."""

    def admit(self, method: str, metadata: Metadata) -> None:
        """Raises UnauthenticatedError for a call that may not come in."""


@dataclass(frozen=True)
class Entrance:
    """How a server is reached."""

    door: Door
    certificates: Certificates | None
    """What it shows, and what clients must show; None: there is no TLS."""


class ClusterTokens:
    """Makes tokens for calls within a cluster and checks them; the `Door` of every service that is not public.

    Args:
        now: seconds since 1970.
    """

    def __init__(self, secret: bytes, now: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._now = now
        self._fresh: dict[str, tuple[float, str]] = {}

    @classmethod
    def entrance(cls, settings: ServiceSettings) -> Entrance:
        """Of a service that only others of its cluster may call."""
        return Entrance(cls(settings.secret_bytes), Certificates(settings.tls) if settings.tls else None)

    def metadata(self, method: str) -> tuple[str, str]:
        """The entry for a call of a method, such as /zipserve.v1.PrefillService/Prefill."""
        now_s = self._now()
        made_s, token = self._fresh.get(method, (float("-inf"), ""))
        if not 0.0 <= now_s - made_s < _FRESH_S:
            stamp = f"{now_s:.0f}"
            token = f"{stamp}.{self._mac(stamp, method)}"
            self._fresh[method] = now_s, token
        return TOKEN_KEY, token

    def admit(self, method: str, metadata: Metadata) -> None:
        """Raises UnauthenticatedError for a call without a token of this cluster."""
        token = next((value for key, value in metadata if key == TOKEN_KEY), "")
        stamp, _, mac = str(token).partition(".")
        if not hmac.compare_digest(mac.encode(errors="replace"), self._mac(stamp, method).encode()):
            raise UnauthenticatedError("the call has no token of this cluster: only its own services may make it")
        off_s = abs(self._now() - float(stamp))  # ours, so that it is a number
        if off_s > _VALID_S:
            raise UnauthenticatedError(
                f"the token of the call is {off_s:.0f} s off, at most {_VALID_S:.0f} s are allowed: are clocks wrong?"
            )

    def _mac(self, stamp: str, method: str) -> str:
        signed = f"zipserve.v1 call\0{stamp}\0{method}".encode(errors="replace")
        return hmac.new(self._secret, signed, hashlib.sha256).hexdigest()
