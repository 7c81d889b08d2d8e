"""What one token stands for by itself, in bytes: half characters too, which text cannot show."""

import re

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Bytes of single tokens of a tokenizer."""

    def __init__(self, backend: Tokenizer) -> None:
        decoder = str(backend.decoder)
        self._backend = backend
        self._bytes_of_characters = _byte_level() if "ByteLevel" in decoder else None
        self._pieces = "ByteFallback" in decoder or "Metaspace" in decoder
        self._added = {
            token_id: token.content.encode() for token_id, token in backend.get_added_tokens_decoder().items()
        }

    def __call__(self, token_id: int) -> bytes:
        """The bytes of a token, special ones by their name; of an id without a token none."""
        added = self._added.get(token_id)
        if added is not None:
            return added
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._bytes_of_characters is not None:
            return bytes(self._bytes_of_characters.get(character, ord("?")) for character in token)
        if self._pieces:
            byte = _BYTE.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()


def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones for themselves, the others by
    characters from U+0100 on (GPT-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
