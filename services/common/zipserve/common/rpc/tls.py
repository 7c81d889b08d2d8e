"""TLS from files that may be exchanged while a service runs: connections that exist stay, new ones use the new files.

A pair of certificate and key that does not fit, as while one of them is written and the other is not, is not taken; the
last one that did is used on.
"""

import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from zipserve.common import files, log
from zipserve.common.errors import InvalidRequestError

_log = log.get()
_LOOK_S = 1.0


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files."""

    cert: str
    """Own certificate, and what leads from it to its authority."""
    key: str
    ca: str = ""
    """Authorities that certificates of the other side are checked against. Empty: a server asks for none."""


@dataclass(frozen=True)
class _Pem:
    cert: bytes
    key: bytes
    ca: bytes


class Certificates:
    """What the files say, looked at again every second when somebody connects. Safe to use from several threads.

    Raises:
        InvalidRequestError: a file cannot be read, or certificate and key do not fit.
    """

    def __init__(self, paths: TlsFiles) -> None:
        self._files = paths
        self._lock = threading.Lock()
        self._looked_s = time.monotonic()
        self._version = self._found()
        try:
            self._pem, self._context = self._load()
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequestError(f"the TLS files {paths} cannot be used: {error}", field="tls_cert") from error
        self.generation = 0
        """Grows when the files were exchanged."""

    def refresh(self) -> None:
        """Reads the files again if they have changed; at most once a second."""
        with self._lock:
            if time.monotonic() - self._looked_s < _LOOK_S:
                return
            self._looked_s = time.monotonic()
            found = self._found()
            if found == self._version:
                return
            try:
                pem, context = self._load()
            except (OSError, ssl.SSLError) as error:
                _log.error("tls.unreadable", cert=self._files.cert, error=str(error))
                return
            self._version, self._context = found, context
            if pem != self._pem:
                self._pem = pem
                self.generation += 1
                _log.info("tls.reloaded", cert=self._files.cert)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server; every new connection gets what the files say then."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._configuration, require_client_authentication=bool(self._files.ca)
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel that is made now."""
        return grpc.ssl_channel_credentials(self._pem.ca or None, self._pem.key, self._pem.cert)

    def server_context(self) -> ssl.SSLContext:
        """For a server of Python's own, such as that of HTTP; every new connection gets what the files say then."""

        def exchange(connection: ssl.SSLObject | ssl.SSLSocket, _: str | None, __: ssl.SSLContext) -> None:
            self.refresh()
            if connection.context is not self._context:
                connection.context = self._context

        self._context.sni_callback = exchange
        return self._context

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        self.refresh()
        pem = self._pem
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca or None)

    def _load(self) -> tuple[_Pem, ssl.SSLContext]:
        cert, key, ca = self._files.cert, self._files.key, self._files.ca
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca or None)
        context.load_cert_chain(cert, key)  # fails if they do not fit
        if ca:
            context.verify_mode = ssl.CERT_REQUIRED
        authorities = Path(ca).read_bytes() if ca else b""
        return _Pem(Path(cert).read_bytes(), Path(key).read_bytes(), authorities), context

    def _found(self) -> tuple[object, ...]:
        return tuple(files.version(Path(path)) for path in (self._files.cert, self._files.key, self._files.ca) if path)
