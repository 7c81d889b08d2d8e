"""A handoff that fails costs the client a pause: router, prefill and decode together, over real NIXL, one fault each.

What is broken once is prefilled again; the client sees the right tokens, each of them once.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from hooked_nixl import Hooks
from inprocess import SECRET, running
from oracle import Oracle
from polling import until
from streams import Stub, collect, request
from workers import Prefill, failures, prompt, workers
from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.pools import Slabs
from zipserve.router.config import RouterSettings
from zipserve.router.service import RouterService

TOKENS = 40
NEW_TOKENS = 30


def held(prefill: Prefill) -> tuple[bytes, Slabs]:
    """The one lease that is out."""
    ((lease_id, lease),) = prefill.service.source._leases._leases.items()
    return lease_id, lease.resource


def flip(prefill: Prefill) -> None:
    view = prefill.service.device.slab_view(SlabKind.BLOCK, held(prefill)[1].blocks[1])
    view[1000] ^= 4


def swap(prefill: Prefill) -> None:
    one, other = (prefill.service.device.slab_view(SlabKind.BLOCK, slab) for slab in held(prefill)[1].blocks)
    one[:], other[:] = bytes(other), bytes(one)


def free(prefill: Prefill) -> None:
    prefill.free_lent(held(prefill)[0])


def end(prefill: Prefill) -> None:
    prefill.service.source.release(held(prefill)[0])


FAULTS: dict[str, Callable[[Prefill], None]] = {"BLOCK_CORRUPT": flip, "BLOCK_SWAPPED": swap, "BLOCK_STALE": free}


@pytest.mark.parametrize("reason", [*FAULTS, "LEASE_EXPIRED"])
async def test_a_broken_handoff_is_prefilled_again(reason: str, tiny_model: Path, redis_url: str, cluster: str) -> None:
    hooks = Hooks()
    async with workers(tiny_model, redis_url, cluster) as cluster_workers:
        pair = await cluster_workers.pair(hooks.open)
        values = {"model": str(tiny_model), "redis_url": redis_url, "cluster": cluster, "secret": SECRET}
        settings = RouterSettings.model_validate({**values, "heartbeat_s": 0.05})
        router = RouterService(settings)
        broken: list[str] = []

        async def break_once() -> None:
            if not broken:
                broken.append(reason)
                FAULTS.get(reason, end)(pair.prefill)

        if reason == "LEASE_EXPIRED":
            hooks.after = break_once
        else:
            hooks.before = break_once
        async with running(router, settings) as address:
            stub = Stub(cluster_workers.channels.get(address))
            answer = await collect(stub, request(prompt(TOKENS), NEW_TOKENS))
        assert broken == [reason]
        assert failures(pair.decode.service.metrics) == {reason: 1}
        assert answer.finished.usage.replays == 1
        assert router.metrics.registry.get_sample_value("zipserve_replays_total", {"reason": reason}) == 1
        assert len(answer.token_ids) == NEW_TOKENS
        assert Oracle(tiny_model).first_wrong(prompt(TOKENS), answer.token_ids) is None
        await until(lambda: pair.decode.service.load().free_blocks == 24, "decode has freed its slabs")
        await pair.settled()
