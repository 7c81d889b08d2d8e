"""Handles: any changed byte is refused, and only the cluster's secret makes a good one."""

import hashlib
import hmac
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import HandleForgedError
from zipserve.common.kv.handle import open_handle, sign
from zipserve.v1.kv_pb2 import SLAB_KIND_BLOCK, BlockRef, KvClaims, KvHandle

SECRET = b"a secret of sixteen bytes or more"
CLAIMS = KvClaims(
    worker_id="prefill-0",
    incarnation=1 << 63,
    layout_fingerprint=bytes(range(32)),
    refs=[BlockRef(kind=SLAB_KIND_BLOCK, slab=3, bytes=4096, generation=9, tokens=16, checksum=2**64 - 1)],
    tokens=16,
    lease_id=b"0123456789abcdef",
)


def test_round_trip() -> None:
    handle = sign(CLAIMS, SECRET)
    assert open_handle(handle, SECRET) == CLAIMS
    assert open_handle(KvHandle.FromString(handle.SerializeToString()), SECRET) == CLAIMS


@pytest.mark.parametrize("part", ["claims", "mac"])
def test_every_changed_bit_is_refused(part: str) -> None:
    handle = sign(CLAIMS, SECRET)
    good = getattr(handle, part)
    for bit in range(8 * len(good)):
        forged = KvHandle(claims=handle.claims, mac=handle.mac)
        setattr(forged, part, _flipped(good, bit))
        with pytest.raises(HandleForgedError):
            open_handle(forged, SECRET)


@given(claims=st.binary(max_size=200), mac=st.binary(max_size=64))
def test_nothing_made_without_the_secret_opens(claims: bytes, mac: bytes) -> None:
    with pytest.raises(HandleForgedError):
        open_handle(KvHandle(claims=claims, mac=mac), SECRET)


@pytest.mark.parametrize(
    "mac",
    [
        b"",
        b"\0" * 32,
        lambda claims: hashlib.sha256(claims).digest(),
        lambda claims: hmac.new(SECRET, claims, hashlib.sha256).digest(),  # without the purpose in front
        lambda claims: hmac.new(b"", b"zipserve.v1.KvClaims\0" + claims, hashlib.sha256).digest(),
    ],
    ids=["empty", "zeros", "plain-hash", "no-purpose", "no-secret"],
)
def test_weak_signatures(mac: object) -> None:
    claims = CLAIMS.SerializeToString()
    made: Any = mac(claims) if callable(mac) else mac
    with pytest.raises(HandleForgedError):
        open_handle(KvHandle(claims=claims, mac=made), SECRET)


def test_another_cluster_s_handle() -> None:
    with pytest.raises(HandleForgedError, match="signature"):
        open_handle(sign(CLAIMS, b"the secret of another cluster"), SECRET)


def test_truncated_and_extended_signatures() -> None:
    handle = sign(CLAIMS, SECRET)
    for mac in (handle.mac[:-1], handle.mac + b"\0", handle.mac[:16]):
        with pytest.raises(HandleForgedError):
            open_handle(KvHandle(claims=handle.claims, mac=mac), SECRET)


def test_signed_but_unreadable_claims_are_refused() -> None:
    claims = b"\xff\xff\xff"
    mac = hmac.new(SECRET, b"zipserve.v1.KvClaims\0" + claims, hashlib.sha256).digest()
    with pytest.raises(HandleForgedError, match="not readable"):
        open_handle(KvHandle(claims=claims, mac=mac), SECRET)


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)
