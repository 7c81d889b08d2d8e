"""The KV store among workers: it takes what they have, keeps it in memory and on disk, and gives it back."""

import asyncio
import secrets
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

from memory_transport import Fabric
from oracle import Oracle
from polling import until
from workers import BLOCK, Prefill, Store, Workers, claims_of, prompt, value
from zipserve.common import errors
from zipserve.common.kv.holders import Holders
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import SlabPools
from zipserve.common.kv.prefix import chain_salt, prefix_hashes
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.common.kv.seals import Seals
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.status import client_errors
from zipserve.common.transfer import fetch
from zipserve.common.transfer.fetch import PrefixFetcher
from zipserve.kvstore.disk import DiskTier
from zipserve.kvstore.store import Store as StoreTiers
from zipserve.v1.kv_pb2 import KvHandle
from zipserve.v1.kv_store_service_pb2 import LookupRequest, PinRequest
from zipserve.v1.kv_store_service_pb2_grpc import KvStoreServiceStub
from zipserve.v1.kv_transfer_service_pb2 import ReleaseLeaseRequest, RenewLeasesRequest
from zipserve.v1.kv_transfer_service_pb2_grpc import KvTransferServiceStub
from zipserve.v1.prefill_service_pb2 import PrefillResponse

TOKENS = 5 * BLOCK + 7


def names_of(worker: Prefill, token_ids: list[int], salt: str = "") -> list[bytes]:
    layout = worker.service.device.layout
    size = layout.block_tokens
    return prefix_hashes(token_ids[: len(token_ids) // size * size], size, chain_salt(layout.fingerprint, salt))


def give_up(worker: Prefill, *answers: PrefillResponse) -> None:
    for answer in answers:
        worker.service.source.release_handle(answer.handle)


async def fill(store: Store, workers: Workers, fabric: Fabric, *prompts: list[int], **settings: Any) -> list[int]:
    """A worker computes prompts, the store takes them, the worker goes away; returns the tokens after them."""
    tokens = []
    async with workers.a_prefill(fabric.open, worker_id="prefill-a", **settings) as worker:
        for token_ids in prompts:
            answer = await worker.compute(token_ids)
            tokens.append(answer.token_id)
            give_up(worker, answer)
            await store.has(names_of(worker, token_ids))
    return tokens


async def known(worker: Prefill, store: Store, token_ids: list[int], blocks: int) -> None:
    names, key = names_of(worker, token_ids), (store.settings.worker_id, store.service._incarnation)
    runs = worker.service.peers.holders.runs
    await until(lambda: runs(names).get(key, 0) == blocks, f"the store is known to have {blocks} blocks")


@pytest.mark.parametrize("codec", ["raw", "zip-4/32"])
@pytest.mark.parametrize("disk", [False, True])
async def test_blocks_outlive_their_worker(codec: str, disk: bool, cluster_workers: Workers, tmp_path: Path) -> None:
    fabric, size = Fabric(), 64 if codec != "raw" else BLOCK
    settings: dict[str, Any] = {"codec": codec, "block_tokens": size, "step_tokens": size}
    store = await cluster_workers.kvstore(fabric.open, disk_path=str(tmp_path / "disk") if disk else "")
    token_ids = prompt(4 * size + 9)
    (token_id,) = await fill(store, cluster_workers, fabric, token_ids, **settings)
    other = await cluster_workers.prefill(fabric.open, worker_id="prefill-b", **settings)
    await known(other, store, token_ids, 4)
    answer = await other.compute(token_ids)
    assert (answer.cached_tokens, answer.token_id) == (4 * size, token_id)
    give_up(other, answer)


async def test_what_was_generated_is_kept_too(cluster_workers: Workers, tiny_model: Path) -> None:
    fabric, token_ids = Fabric(), prompt(TOKENS)
    store = await cluster_workers.kvstore(fabric.open)
    prefill = await cluster_workers.prefill(fabric.open, worker_id="prefill-a")
    async with cluster_workers.a_decode(fabric.open) as decode:
        first = await prefill.compute(token_ids)
        answer = await decode.tokens(first, 3 * BLOCK, past_token_ids=token_ids)
        history = [*token_ids, first.token_id, *answer][:-1]
        await store.has(names_of(prefill, history))
    turn = history + prompt(20, salt=5)
    await known(prefill, store, history, len(history) // BLOCK)
    again = await prefill.compute(turn)
    assert again.cached_tokens == len(history) // BLOCK * BLOCK
    assert Oracle(tiny_model).first_wrong(turn, [again.token_id]) is None
    give_up(prefill, again)
    await store.has(names_of(prefill, turn))


async def test_disk_holds_what_memory_cannot(cluster_workers: Workers, tiny_model: Path, tmp_path: Path) -> None:
    """A working set of four times the memory: everything is found again, and is right."""
    fabric, prompts = Fabric(), [prompt(TOKENS, salt=i) for i in range(8)]
    async with cluster_workers.a_prefill(fabric.open, worker_id="prefill-a") as worker:
        slab_bytes = worker.service.device.layout.slab_bytes(SlabKind.BLOCK)
        store = await cluster_workers.kvstore(fabric.open, memory_bytes=10 * slab_bytes, disk_path=str(tmp_path))
        for token_ids in prompts:
            give_up(worker, await worker.compute(token_ids))
            await store.has(names_of(worker, token_ids))
    assert store.service.load().total_blocks == 10
    other = await cluster_workers.prefill(fabric.open, worker_id="prefill-b")
    for token_ids in prompts:
        await known(other, store, token_ids, 5)
        answer = await other.compute(token_ids)
        assert answer.cached_tokens == 5 * BLOCK
        assert Oracle(tiny_model).first_wrong(token_ids, [answer.token_id]) is None
        give_up(other, answer)
    assert value(store.service.metrics, "zipserve_kv_blocks_promoted_total") >= 30


async def test_disk_outlives_the_store(
    cluster_workers: Workers, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # who asks for the torn block before the directory has lost it would leave the store alone for a while
    monkeypatch.setitem(fetch._AVOIDED_S, "missed", 0.0)
    fabric, prompts = Fabric(), [prompt(TOKENS, salt=i) for i in range(3)]
    async with cluster_workers.a_kvstore(fabric.open, disk_path=str(tmp_path)) as store:
        await fill(store, cluster_workers, fabric, *prompts)
        (blocks,) = tmp_path.glob("*/blocks")  # noqa: ASYNC240  # a handful of files
        names = [block.name for block in store.service.store._disk.index]  # type: ignore[union-attr]
    content = bytearray(blocks.read_bytes())
    torn = content.find(names[7])  # the third block of the second prompt
    assert torn >= 0
    content[torn + 6000 if len(content) > torn + 6000 else torn + 100] ^= 1
    blocks.write_bytes(content)
    other = await cluster_workers.prefill(fabric.open, worker_id="prefill-b")
    store = await cluster_workers.kvstore(fabric.open, disk_path=str(tmp_path))
    cached = []
    for token_ids in prompts:
        await known(other, store, token_ids, 5)
        answer = await other.compute(token_ids)
        assert Oracle(tiny_model).first_wrong(token_ids, [answer.token_id]) is None
        cached.append(answer.cached_tokens // BLOCK)
        give_up(other, answer)
    assert cached == [5, 2, 5], "what is torn is not served, nor what is behind it"


async def test_a_store_that_was_killed_serves_its_disk_again(cluster_workers: Workers, tmp_path: Path) -> None:
    fabric, token_ids = Fabric(), prompt(TOKENS)
    copy = tmp_path / "copy"
    async with cluster_workers.a_kvstore(fabric.open, disk_path=str(tmp_path / "disk")) as store:
        await fill(store, cluster_workers, fabric, token_ids)
        shutil.copytree(tmp_path / "disk", copy)  # as it is at that moment, without any farewell
    other = await cluster_workers.prefill(fabric.open, worker_id="prefill-b")
    store = await cluster_workers.kvstore(fabric.open, disk_path=str(copy))
    await known(other, store, token_ids, 5)
    answer = await other.compute(token_ids)
    assert answer.cached_tokens == 5 * BLOCK
    give_up(other, answer)


async def test_tenants_share_nothing(cluster_workers: Workers) -> None:
    fabric, token_ids = Fabric(), prompt(TOKENS)
    store = await cluster_workers.kvstore(fabric.open)
    worker = await cluster_workers.prefill(fabric.open)
    give_up(worker, await worker.compute(token_ids, cache_salt="a"))
    await store.has(names_of(worker, token_ids, "a"))
    stub: Any = KvStoreServiceStub(store.channels.get(store.address))
    fingerprint = worker.service.device.layout.fingerprint
    for salt, blocks in (("a", 5), ("b", 0), ("", 0)):
        request = LookupRequest(layout_fingerprint=fingerprint, prefix_hashes=names_of(worker, token_ids, salt))
        assert (await stub.Lookup(request, timeout=5)).blocks == blocks


async def test_forged_and_stale_leases_are_refused(cluster_workers: Workers) -> None:
    """A thousand of each kind; nothing of it leaves a trace."""
    fabric, token_ids = Fabric(), prompt(TOKENS)
    store = await cluster_workers.kvstore(fabric.open)
    worker = await cluster_workers.prefill(fabric.open)
    answer = await worker.compute(token_ids)
    give_up(worker, answer)
    names = names_of(worker, token_ids)
    await store.has(names)
    channel = store.channels.get(store.address)
    shared: Any = KvStoreServiceStub(channel)
    transfer: Any = KvTransferServiceStub(channel)
    free = store.service.load().free_blocks
    fingerprint = worker.service.device.layout.fingerprint
    for _ in range(1000):
        stale = await shared.Pin(PinRequest(layout_fingerprint=fingerprint, prefix_hashes=names), timeout=5)
        lease_id = claims_of(stale.handle).lease_id
        assert (await transfer.ReleaseLease(ReleaseLeaseRequest(lease_id=lease_id), timeout=5)).was_alive
        forged = secrets.token_bytes(16)
        renewed = await transfer.RenewLeases(RenewLeasesRequest(lease_ids=[lease_id, forged]), timeout=5)
        assert list(renewed.lost_lease_ids) == [lease_id, forged]
        for ended in (lease_id, forged):
            assert not (await transfer.ReleaseLease(ReleaseLeaseRequest(lease_id=ended), timeout=5)).was_alive
        with pytest.raises(errors.HandleForgedError):
            store.service.peers.source.release_handle(KvHandle(claims=stale.handle.claims, mac=secrets.token_bytes(32)))
    load = store.service.load()
    assert (load.leases, load.free_blocks) == (0, free)


async def test_another_layout_is_refused(cluster_workers: Workers) -> None:
    fabric = Fabric()
    store = await cluster_workers.kvstore(fabric.open)
    worker = await cluster_workers.prefill(fabric.open)
    give_up(worker, await worker.compute(prompt(TOKENS)))
    names = names_of(worker, prompt(TOKENS))
    await store.has(names)
    stub: Any = KvStoreServiceStub(store.channels.get(store.address))
    with pytest.raises(errors.LayoutMismatchError), client_errors():
        await stub.Pin(PinRequest(layout_fingerprint=b"f" * 32, prefix_hashes=names), timeout=5)


async def test_a_store_that_drains_lends_nothing_more(cluster_workers: Workers) -> None:
    fabric, token_ids = Fabric(), prompt(TOKENS)
    store = await cluster_workers.kvstore(fabric.open)
    worker = await cluster_workers.prefill(fabric.open)
    give_up(worker, await worker.compute(token_ids))
    names = names_of(worker, token_ids)
    await store.has(names)
    store.service.begin_drain()
    stub: Any = KvStoreServiceStub(store.channels.get(store.address))
    request = PinRequest(layout_fingerprint=worker.service.device.layout.fingerprint, prefix_hashes=names)
    pinned = await stub.Pin(request, timeout=5)
    assert (pinned.blocks, pinned.HasField("handle")) == (0, False)


async def test_of_a_prompt_that_is_larger_than_its_memory_it_keeps_the_beginning(cluster_workers: Workers) -> None:
    fabric, token_ids = Fabric(), prompt(TOKENS)
    worker = await cluster_workers.prefill(fabric.open)
    slab_bytes = worker.service.device.layout.slab_bytes(SlabKind.BLOCK)
    store = await cluster_workers.kvstore(fabric.open, memory_bytes=3 * slab_bytes)
    give_up(worker, await worker.compute(token_ids))
    await store.has(names_of(worker, token_ids)[:3])


async def test_blocks_of_another_layout_are_left_alone(cluster_workers: Workers) -> None:
    fabric, token_ids = Fabric(), prompt(TOKENS)
    worker = await cluster_workers.prefill(fabric.open, worker_id="prefill-a")
    store = await cluster_workers.kvstore(fabric.open)
    await until(lambda: store.service.store is not None, "the store has a layout")
    foreign = await cluster_workers.prefill(fabric.open, worker_id="prefill-b", codec="int8")
    give_up(foreign, await foreign.compute(token_ids))
    holders = store.service.peers.holders
    await until(lambda: holders.runs(names_of(foreign, token_ids)) != {}, "the store has heard of them")
    give_up(worker, await worker.compute(token_ids))
    await store.has(names_of(worker, token_ids))
    assert value(store.service.metrics, "zipserve_kv_prefix_fetches_total", outcome="failed") == 0


async def test_blocks_behind_each_other_are_wanted_once() -> None:
    """Hearing of a long sequence must not stop the event loop for a time that grows with its square."""
    layout = Layout("m", "0", 1, 1, 16, 16, "float32", "raw", BLOCK)
    index = PrefixIndex(SlabPools(layout, blocks=4, tails=0, sinks=0))
    names, asked = prefix_hashes(range(1000), 1, b""), list[bytes]()

    class Asked(Holders):
        def chain(self, name: bytes) -> list[bytes]:
            asked.append(name)
            return super().chain(name)

    holders, fetcher = Asked(), create_autospec(PrefixFetcher, instance=True)
    holders.add(("a", 1), b"", names)
    store = StoreTiers(index, create_autospec(Seals, instance=True), 1, None, Metrics())
    for name in names:
        store.want(name)
    running = asyncio.create_task(store.run(fetcher, holders))
    await until(lambda: not store._wanted and bool(asked), "all has been looked for")
    running.cancel()
    assert asked == names[-1:]


@pytest.mark.parametrize("use", ["store", "load"])
async def test_its_disk_is_closed_when_nobody_uses_it(
    use: str, cluster_workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabric, token_ids = Fabric(), prompt(TOKENS)
    worker = await cluster_workers.prefill(fabric.open, worker_id="prefill-a")
    names, layout = names_of(worker, token_ids), worker.service.device.layout
    give_up(worker, await worker.compute(token_ids))
    if use == "load":
        async with cluster_workers.a_kvstore(fabric.open, disk_path=str(tmp_path)) as store:
            await store.has(names)
    entered, ending, closed = threading.Event(), threading.Event(), threading.Event()
    was_closed: list[bool] = []
    work, close = getattr(DiskTier, use), DiskTier.close

    def slow(self: DiskTier, *args: Any) -> None:
        entered.set()
        assert ending.wait(20.0)
        was_closed.append(closed.wait(2.5))  # longer than calls under way get to end
        work(self, *args)

    def note_closed(self: DiskTier) -> None:
        closed.set()
        close(self)

    monkeypatch.setattr(DiskTier, use, slow)
    monkeypatch.setattr(DiskTier, "close", note_closed)
    async with cluster_workers.a_kvstore(fabric.open, check=False, disk_path=str(tmp_path)) as store:
        stub: Any = KvStoreServiceStub(store.channels.get(store.address))
        request = PinRequest(layout_fingerprint=layout.fingerprint, prefix_hashes=names)
        await until(lambda: store.service.store is not None, "the store has a layout")
        pinning = asyncio.ensure_future(stub.Pin(request, timeout=20).code())
        await until(entered.is_set, "the disk is in use")
        ending.set()
    await pinning
    assert was_closed[0] is False
    assert closed.is_set()
