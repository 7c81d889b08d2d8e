"""Handles: what a prefill hands over, signed so that no one else can issue or change one."""

import hashlib
import hmac

from google.protobuf.message import DecodeError

from zipserve.common.errors import HandleForgedError
from zipserve.v1 import kv_pb2

LEASE_ID_BYTES = 16


def sign(claims: kv_pb2.KvClaims, secret: bytes) -> kv_pb2.KvHandle:
    """Signs claims with the cluster's secret."""
    serialized = claims.SerializeToString()
    return kv_pb2.KvHandle(claims=serialized, mac=_mac(serialized, secret))


def open_handle(handle: kv_pb2.KvHandle, secret: bytes) -> kv_pb2.KvClaims:
    """Returns the claims of a handle.

    Raises:
        HandleForgedError: the signature does not fit; nothing of the claims was looked at.
    """
    if not hmac.compare_digest(_mac(handle.claims, secret), handle.mac):
        raise HandleForgedError("the handle's signature does not fit its content")
    claims = kv_pb2.KvClaims()
    try:
        claims.ParseFromString(handle.claims)
    except DecodeError as error:
        raise HandleForgedError("the handle's content is not readable") from error
    return claims


def _mac(claims: bytes, secret: bytes) -> bytes:
    return hmac.new(secret, b"zipserve.v1.KvClaims\0" + claims, hashlib.sha256).digest()
