"""Which blocks the store holds. Pure."""

from collections.abc import Sequence


class Directory:
    """Blocks by (layout fingerprint, prefix hash). Nothing puts blocks in yet, so every answer is 0."""

    def __init__(self) -> None:
        self._slabs: dict[tuple[bytes, bytes], int] = {}

    def longest_run(self, fingerprint: bytes, prefix_hashes: Sequence[bytes]) -> list[int]:
        """Slabs of the longest run of blocks, from the first hash on, that is held."""
        run = []
        for prefix_hash in prefix_hashes:
            slab = self._slabs.get((fingerprint, prefix_hash))
            if slab is None:
                break
            run.append(slab)
        return run
