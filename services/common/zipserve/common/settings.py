"""Settings that every service shares. One frozen class per service derives from `ServiceSettings`.

A setting `drain_s` of the prefill service is `--drain-s 30` or `ZIPSERVE_PREFILL_DRAIN_S=30`; the command line wins. An
unknown name is an error in both. The environment is read nowhere else.
"""

import os
import uuid
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from zipserve.common.rpc.tls import TlsFiles

SECRET_BYTES_MIN = 16


def _standard_endpoint() -> str:
    """Where OpenTelemetry's own variables send traces; empty: nowhere."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return ""
    both = (os.environ.get(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT", "") for kind in ("TRACES_", ""))
    return next(filter(None, both), "")


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach who listens on host:port."""
    host = address.rpartition(":")[0]
    return host in {"localhost", "[::1]"} or host.startswith("127.")


class ServiceSettings(BaseSettings):
    """Settings of any service."""

    model_config = SettingsConfigDict(
        env_prefix="ZIPSERVE_",
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,  # the input may be the secret
        cli_kebab_case=True,
        cli_hide_none_type=True,
    )

    cluster: str = Field(default="default", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Name that separates installations that share a Redis; prefix of every key."""
    worker_id: str = Field(default_factory=lambda: uuid.uuid4().hex[:12], pattern=r"^[A-Za-z0-9._-]{1,128}$")
    """Unique name of this process; drawn at random when not given."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """Redis (or Valkey) that holds the registry."""
    secret: SecretStr
    """Secret of the cluster, at least 16 bytes, the same for all its services: signs KV handles, and
    the calls among them."""
    tls_cert: str = ""
    """PEM file of the certificate that this service shows to others of the cluster, as a server and as a client: mutual
    TLS, on as soon as it is set, and then for all services. The file may be exchanged at any time, as those below."""
    tls_key: str = ""
    """PEM file of its key."""
    tls_ca: str = ""
    """PEM file of the authorities that certificates of the cluster's services are checked against."""
    tls_name: str = ""
    """Name that the certificates of all services have, where they do not have those of their hosts. Empty: a service's
    certificate must have the name or IP address under which it is called."""
    listen: str = Field(default="127.0.0.1:0", pattern=r"^[^\s:]\S*:\d{1,5}$")
    """host:port of the gRPC server; port 0 takes a free one."""
    advertise_host: str = ""
    """Host under which others reach this process. Empty: the host of `listen`."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of /metrics, for Prometheus, and of /health and /live, for a kubelet, over HTTP on the host of `listen`; 0
    takes a free one. Unset: none."""
    otlp_endpoint: str = Field(default_factory=_standard_endpoint, pattern=r"^(https?://\S+)?$")
    """Where traces go: http://host:port of an OTLP/gRPC collector, or https://. Unset: as the standard
    OTEL_EXPORTER_OTLP_(TRACES_)ENDPOINT says. Empty: nothing is traced."""
    drain_s: float = Field(default=30.0, ge=0.0)
    """Longest wait for running work after SIGTERM, in seconds."""
    heartbeat_s: float = Field(default=0.5, gt=0.0)
    """Time between heartbeats to the registry, in seconds."""
    registry_ttl_s: float = Field(default=5.0, gt=0.0)
    """Time after which a silent worker leaves the registry, in seconds; at least three heartbeats."""
    message_bytes_max: int = Field(default=4 << 20, ge=1 << 16)
    """Largest gRPC message accepted, in bytes."""
    connection_calls_max: int = Field(default=1024, ge=1)
    """Most calls at once over one connection; more wait at the client."""
    connection_age_max_s: float = Field(default=0.0, ge=0.0)
    """Age at which a client is asked for a new connection, so that it finds other replicas, in seconds; calls end on
    the old one. 0: never."""
    reflection: bool = False
    """Serve gRPC reflection."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log level that is written."""
    log_format: Literal["json", "console"] = "json"
    """JSON lines, or aligned text for people."""

    @field_validator("secret")
    @classmethod
    def _secret_is_long_enough(cls, value: SecretStr) -> SecretStr:
        size = len(value.get_secret_value().encode())
        if size < SECRET_BYTES_MIN:
            raise ValueError(f"must have at least {SECRET_BYTES_MIN} bytes, has {size}")
        return value

    @field_validator("listen")
    @classmethod
    def _port_exists(cls, value: str) -> str:
        port = int(value.rpartition(":")[2])
        if port > 65535:
            raise ValueError(f"the port must be at most 65535, is {port}")
        return value

    @model_validator(mode="after")
    def _a_late_heartbeat_is_no_death(self) -> Self:
        if self.registry_ttl_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"registry_ttl_s is {self.registry_ttl_s:g}, must be at least 3 x heartbeat_s ({self.heartbeat_s:g})"
            )
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        given = [bool(self.tls_cert), bool(self.tls_key), bool(self.tls_ca)]
        if any(given) != all(given):
            raise ValueError("tls_cert, tls_key and tls_ca belong together: set all of them, or none")
        return self

    @property
    def tls(self) -> TlsFiles | None:
        """Files of the TLS among the services; None: there is none."""
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_ca) if self.tls_cert else None

    @property
    def secret_bytes(self) -> bytes:
        """The secret as keys of HMACs."""
        return self.secret.get_secret_value().encode()

    @property
    def host(self) -> str:
        """Host of `listen`."""
        return self.listen.rpartition(":")[0]

    def advertised(self, port: int) -> str:
        """host:port under which others reach this process."""
        return f"{self.advertise_host or self.host}:{port}"

    @classmethod
    def load(cls, arguments: Sequence[str] | None = None) -> Self:
        """Reads the command line (None: the process's own), then the environment, then the defaults.

        Raises:
            pydantic.ValidationError: a value is out of its range.
            SystemExit: the command line has an unknown name, or asked for help.
        """
        prefix = cls.model_config.get("env_prefix", "")
        known = {f"{prefix}{name}".upper() for name in cls.model_fields}
        # pydantic reads names in any case
        unknown = sorted(name for name in os.environ if name.upper().startswith(prefix) and name.upper() not in known)
        if unknown:
            raise SystemExit(f"unknown settings in the environment: {', '.join(unknown)}")
        options: dict[str, Any] = {"_cli_parse_args": list(arguments) if arguments is not None else True}
        return cls(**options)
