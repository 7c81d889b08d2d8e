"""What tests of blocks that workers share begin with: their names, who knows of them, and what was fetched."""

import asyncio
from typing import Any

from memory_transport import Fabric
from polling import until
from workers import Decode, Prefill, Workers, value
from zipserve.common.kv.prefix import chain_salt, prefix_hashes
from zipserve.v1.prefill_service_pb2 import PrefillResponse


def names_of(worker: Prefill | Decode, token_ids: list[int], salt: str = "") -> list[bytes]:
    """Of the full blocks of a sequence."""
    layout = worker.service.device.layout
    full = len(token_ids) // layout.block_tokens * layout.block_tokens
    return prefix_hashes(token_ids[:full], layout.block_tokens, chain_salt(layout.fingerprint, salt))


async def knows(
    worker: Prefill | Decode, other: Prefill | Decode, token_ids: list[int], blocks: int, salt: str = ""
) -> None:
    """Returns when a worker knows that another one holds so many blocks of a sequence."""
    names = names_of(other, token_ids, salt)
    key = other.settings.worker_id, other.service.device.incarnation
    await until(
        lambda: worker.service.peers.holders.runs(names).get(key, 0) == blocks, f"{key[0]} holds {blocks} blocks"
    )


def give_up(worker: Prefill, *answers: PrefillResponse) -> None:
    """Releases the handles of answers."""
    for answer in answers:
        worker.service.source.release_handle(answer.handle)


def fetches(worker: Prefill | Decode) -> dict[str, float]:
    """Fetches that have ended, by outcome, without zeros."""
    kinds = ("fetched", "missed", "failed")
    found = {k: value(worker.service.metrics, "zipserve_kv_prefix_fetches_total", outcome=k) for k in kinds}
    return {kind: count for kind, count in found.items() if count}


async def two(workers: Workers, fabric: Fabric | None = None, **settings: Any) -> tuple[Prefill, Prefill]:
    """Two prefill workers that can read from each other."""
    meet = (fabric or Fabric()).open
    first = await workers.prefill(meet, worker_id="prefill-a", **settings)
    return first, await workers.prefill(meet, worker_id="prefill-b", **settings)


class Reads:
    """Holds up all reads of a fabric until `go`."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._go = asyncio.Event()
        fabric.faults.before = self._wait

    async def _wait(self) -> None:
        await self._go.wait()

    async def begun(self) -> None:
        """Returns when one is held up."""
        await until(lambda: self._fabric.reads > 0, "a read has begun")

    def go(self) -> None:
        """Lets them all through from now on."""
        self._go.set()
