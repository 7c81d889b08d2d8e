"""Who has, or is about to have, which prefix. Pure; bounded.

The directory tells what workers and stores hold. What this router has sent to prefill workers it remembers by itself,
so that prompts that begin alike meet while the first is still being computed, and when the directory cannot be reached.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from zipserve.common.kv.holders import Holders
from zipserve.common.kv.prefix import chain_salt, prefix_hashes
from zipserve.router.policy import Worker, WorkerKey

_SENT_MAX = 8
"""Workers that are remembered for a block, the last ones that were sent it."""


class Prefixes:
    """Blocks by name, as workers name them.

    Args:
        names_max: blocks that are remembered, those that were sent last; 0: none.
        holders: what the directory tells.
        fetch_cost: time to fetch a block from somebody else, as a share of the time to compute it.
    """

    def __init__(self, names_max: int, holders: Holders, fetch_cost: float) -> None:
        self._names_max = names_max
        self._holders = holders
        self._fetch_cost = fetch_cost
        self._sent: OrderedDict[bytes, list[WorkerKey]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def note(self, worker: Worker, token_ids: Sequence[int], cache_salt: str) -> None:
        """Remembers that a worker was sent a prompt."""
        for name in reversed(_names(worker, token_ids, cache_salt)):
            sent = [key for key in self._sent.pop(name, ()) if key != worker.key]
            self._sent[name] = [*sent, worker.key][-_SENT_MAX:]
        while len(self._sent) > self._names_max:
            self._sent.popitem(last=False)

    def to_compute(self, workers: Iterable[Worker], token_ids: Sequence[int], cache_salt: str) -> dict[WorkerKey, int]:
        """What each worker would have to do for a prompt before its first token, in tokens to compute, at least one.

        Blocks that somebody else holds count as little as it takes to fetch them.
        """
        names: dict[tuple[bytes, int], list[bytes]] = {}
        runs: dict[tuple[bytes, int], dict[WorkerKey, int]] = {}
        left = {}
        for worker in workers:
            layout = worker.writable_layout, worker.block_tokens
            if layout not in names:
                names[layout] = _names(worker, token_ids[:-1], cache_salt)
                runs[layout] = self._holders.runs(names[layout])
            held = max(self._sent_to(worker, names[layout]), runs[layout].get(worker.key, 0))
            elsewhere = max(runs[layout].values(), default=0)
            saved = held + max(0, elsewhere - held) * (1 - self._fetch_cost)
            left[worker.key] = max(1, len(token_ids) - round(saved * worker.block_tokens))
        return left

    def _sent_to(self, worker: Worker, names: Sequence[bytes]) -> int:
        """Leading blocks that a worker was sent."""
        return next((i for i, name in enumerate(names) if worker.key not in self._sent.get(name, ())), len(names))


def _names(worker: Worker, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
    """Of the full blocks."""
    size = worker.block_tokens
    if not size:
        return []
    return prefix_hashes(
        token_ids[: len(token_ids) // size * size], size, chain_salt(worker.writable_layout, cache_salt)
    )
