"""The keys that callers may show, from a file that may change at any time."""

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from zipserve.common import api_keys, files, log
from zipserve.common.errors import InvalidRequestError, UnauthenticatedError
from zipserve.common.rpc.door import Metadata
from zipserve.router.access.keys import Key, parse
from zipserve.router.caller import ANYBODY, Caller

_log = log.get()
_SCHEME = "bearer"
HEADER = "authorization"


class KeyRing:
    """Tells callers by their keys; a `zipserve.common.rpc.door.Door`.

    Args:
        path: the keys file. None: nobody is asked for a key.
        now: seconds since 1970.

    Raises:
        InvalidRequestError: the file cannot be read, is wrong, or has no key.
    """

    def __init__(self, path: Path | None, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._version: object = None
        self._keys: Mapping[str, Key] = {}
        if path is not None:
            self._version = files.version(path)
            self._keys = _read(path)
            _log.info("keys.loaded", keys=len(self._keys))

    @property
    def is_open(self) -> bool:
        """Whether anybody may call."""
        return self._path is None

    def authenticate(self, header: str | None) -> Caller:
        """Who sends this `authorization` header.

        Raises:
            UnauthenticatedError: it has no key, or one that is unknown or has expired.
        """
        if self._path is None:
            return ANYBODY
        scheme, _, shown = (header or "").strip().partition(" ")
        shown = shown.strip()
        if scheme.lower() != _SCHEME or not shown:
            raise UnauthenticatedError("no API key was sent; it belongs into the header 'authorization: Bearer KEY'")
        digest = api_keys.digest(shown)
        key = self._keys.get(digest)
        if key is None or not hmac.compare_digest(key.sha256, digest):
            raise UnauthenticatedError("the API key is not known here")
        if self._now() >= key.expires_at_s:
            raise UnauthenticatedError(f"the API key {key.caller.name!r} has expired")
        return key.caller

    def admit(self, method: str, metadata: Metadata) -> None:
        """Lets a gRPC call in, or raises UnauthenticatedError."""
        self.caller(metadata)

    def caller(self, metadata: Metadata) -> Caller:
        """Who sends a gRPC call with this metadata; raises UnauthenticatedError."""
        value = next((value for key, value in metadata if key == HEADER), None)
        return self.authenticate(value if isinstance(value, str) else None)

    def refresh(self) -> None:
        """Reads the file again if it has changed. What is wrong with it is logged, and the last good keys stay."""
        if self._path is None:
            return
        version = files.version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = _read(self._path)
        except InvalidRequestError as error:
            _log.error("keys.unreadable", error=error.message, kept=len(self._keys))
        else:
            _log.info("keys.loaded", keys=len(self._keys))

    async def watch(self, every_s: float) -> None:
        """Looks at the file again and again, for ever."""
        while True:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(self.refresh)


def _read(path: Path) -> Mapping[str, Key]:
    try:
        return parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidRequestError(f"the keys file {path} cannot be read: {reason}", field="keys_file") from None
    except InvalidRequestError as error:
        raise InvalidRequestError(f"the keys file {path} is wrong: {error.message}", field="keys_file") from None
