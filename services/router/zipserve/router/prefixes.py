"""Which prefill worker was sent which prefix. Pure; bounded; a guess: what a worker still holds, only it knows."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from zipserve.common.kv.prefix import chain_salt, prefix_hashes
from zipserve.router.policy import Worker, WorkerKey

_HOLDERS_MAX = 8
"""Workers that are remembered for a block, the last ones that were sent it."""


class Prefixes:
    """Blocks by name, as workers name them, each with the workers that computed or found it.

    Args:
        names_max: blocks that are remembered, those that were sent last; 0: none.
    """

    def __init__(self, names_max: int) -> None:
        self._names_max = names_max
        self._holders: OrderedDict[bytes, list[WorkerKey]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def note(self, worker: Worker, token_ids: Sequence[int], cache_salt: str) -> None:
        """Remembers that a worker was sent a prompt."""
        for name in reversed(_names(worker, token_ids, cache_salt)):
            holders = [key for key in self._holders.pop(name, ()) if key != worker.key]
            self._holders[name] = [*holders, worker.key][-_HOLDERS_MAX:]
        while len(self._holders) > self._names_max:
            self._holders.popitem(last=False)

    def to_compute(self, workers: Iterable[Worker], token_ids: Sequence[int], cache_salt: str) -> dict[WorkerKey, int]:
        """Tokens of a prompt that each worker would have to compute, at least one."""
        names: dict[tuple[bytes, int], list[bytes]] = {}
        left = {}
        for worker in workers:
            layout = worker.writable_layout, worker.block_tokens
            if layout not in names:
                names[layout] = _names(worker, token_ids[:-1], cache_salt)
            held = 0
            for name in names[layout]:
                if worker.key not in self._holders.get(name, ()):
                    break
                held += worker.block_tokens
            left[worker.key] = len(token_ids) - held
        return left


def _names(worker: Worker, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
    """Of the full blocks."""
    size = worker.block_tokens
    if not size:
        return []
    return prefix_hashes(
        token_ids[: len(token_ids) // size * size], size, chain_salt(worker.writable_layout, cache_salt)
    )
