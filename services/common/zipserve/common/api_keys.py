"""API keys: how one is drawn, and the line of a keys file that stands for it.

Keys are drawn with 256 random bits, so that a plain hash of one tells nothing about it and none needs a salt.
"""

import hashlib
import json
import secrets

_PREFIX = "zs-"
_KEY_BYTES = 32


def draw() -> str:
    """A new key."""
    return _PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest(key: str) -> str:
    """What a keys file holds of a key: its SHA-256, in hex."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def line(key: str, name: str, **limits: str | int | None) -> str:
    """The line of a key for a keys file; limits that are None are left out."""
    return json.dumps({"name": name, "sha256": digest(key), **{k: v for k, v in limits.items() if v is not None}})
