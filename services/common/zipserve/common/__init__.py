"""The runtime that every service shares: settings, errors, gRPC bootstrap, registry, KV format, transport. No torch."""

__version__ = "0.1.0"
