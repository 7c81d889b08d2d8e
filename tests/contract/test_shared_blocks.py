"""Workers find each other's blocks: prompts that a worker never saw, answers of former turns, and what goes wrong."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from memory_transport import Fabric
from oracle import Oracle
from polling import until
from shared_blocks import fetches, give_up, knows, names_of, two
from workers import BLOCK, Workers, claims_of, failures, prompt, value
from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.layout import SlabKind
from zipserve.common.rpc import Context
from zipserve.common.rpc.status import client_errors
from zipserve.common.transfer.sharing import BlockSharing, IndexShelf
from zipserve.v1.kv_pb2 import SLAB_KIND_BLOCK
from zipserve.v1.kv_store_service_pb2 import LookupRequest, PinRequest, PinResponse
from zipserve.v1.kv_store_service_pb2_grpc import KvStoreServiceStub
from zipserve.v1.prefill_service_pb2 import PrefillResponse
from zipserve.v1.sampling_pb2 import SamplingParams

TOKENS = 5 * BLOCK + 7


@pytest.mark.parametrize("codec", ["raw", "zip-4/32"])
async def test_a_worker_takes_what_another_has_computed(codec: str, cluster_workers: Workers) -> None:
    size = 64 if codec != "raw" else BLOCK
    first, second = await two(cluster_workers, codec=codec, block_tokens=size, step_tokens=size)
    token_ids = prompt(4 * size + 9)
    known = await first.compute(token_ids)
    await knows(second, first, token_ids, 4)
    answer = await second.compute(token_ids)
    assert answer.cached_tokens == 4 * size
    assert answer.token_id == known.token_id
    assert fetches(second) == {"fetched": 1}
    before, after = (worker.service.device for worker in (first, second))
    for theirs, ours in zip(claims_of(known.handle).refs, claims_of(answer.handle).refs, strict=True):
        if theirs.kind != SLAB_KIND_BLOCK:
            continue
        kind = SlabKind(theirs.kind)
        one, other = before.slab_view(kind, theirs.slab), after.slab_view(kind, ours.slab)
        assert one[128 : theirs.bytes] == other[128 : ours.bytes], "the same bytes, under another header"
        assert one[:128] != other[:128]
    give_up(first, known)
    give_up(second, answer)


async def test_the_answer_is_the_one_without_reuse(cluster_workers: Workers, tiny_model: Path) -> None:
    first, second = await two(cluster_workers)
    base, oracle = prompt(TOKENS), Oracle(tiny_model)
    give_up(first, await first.compute(base))
    await knows(second, first, base, 5)
    for tokens, cached in ((TOKENS + 3 * BLOCK, 5), (5 * BLOCK, 4), (5 * BLOCK + 1, 5)):
        token_ids = (base + prompt(4 * TOKENS, salt=9))[:tokens]
        answer = await second.compute(token_ids)
        assert oracle.first_wrong(token_ids, [answer.token_id]) is None
        assert answer.cached_tokens == cached * BLOCK
        give_up(second, answer)
    assert fetches(second) == {"fetched": 1}, "what is here is not fetched again"


async def test_only_what_is_missing_is_read(cluster_workers: Workers) -> None:
    first, second = await two(cluster_workers)
    token_ids = prompt(TOKENS)
    give_up(second, await second.compute(token_ids[: 2 * BLOCK + 1]))
    give_up(first, await first.compute(token_ids))
    await knows(second, first, token_ids, 5)
    answer = await second.compute(token_ids)
    assert answer.cached_tokens == 5 * BLOCK
    slab_bytes = second.service.device.layout.wire_bytes(SlabKind.BLOCK, BLOCK)
    assert value(second.service.metrics, "zipserve_kv_transfer_bytes_total", source="prefill") == 3 * slab_bytes
    give_up(second, answer)


async def test_what_many_need_is_fetched_once(cluster_workers: Workers) -> None:
    first, second = await two(cluster_workers)
    token_ids = prompt(TOKENS)
    give_up(first, await first.compute(token_ids))
    await knows(second, first, token_ids, 5)
    answers = await asyncio.gather(*(second.compute([*token_ids, i]) for i in range(3)))
    assert [answer.cached_tokens for answer in answers] == [5 * BLOCK] * 3
    assert fetches(second) == {"fetched": 1}
    give_up(second, *answers)


async def test_one_that_goes_away_leaves_the_fetch_to_the_others(cluster_workers: Workers) -> None:
    first, second = await two(cluster_workers)
    token_ids = prompt(TOKENS)
    give_up(first, await first.compute(token_ids))
    await knows(second, first, token_ids, 5)
    impatient = asyncio.create_task(second.compute(token_ids))
    await until(lambda: bool(second.service.peers.fetcher._coming), "blocks are coming")
    impatient.cancel()
    answer = await second.compute(token_ids)
    assert answer.cached_tokens == 5 * BLOCK
    assert fetches(second) == {"fetched": 1}
    give_up(second, answer)


async def test_blocks_that_were_computed_while_they_were_fetched_stay_in_their_place(cluster_workers: Workers) -> None:
    fabric = Fabric()
    first = await cluster_workers.prefill(fabric.open, worker_id="prefill-a")
    second = await cluster_workers.prefill(fabric.open, worker_id="prefill-b")
    token_ids, names = prompt(TOKENS), names_of(first, prompt(TOKENS))
    give_up(first, await first.compute(token_ids))
    await knows(second, first, token_ids, 5)
    arrives = asyncio.Event()

    async def wait() -> None:
        await arrives.wait()

    fabric.faults.before = wait
    fetching = asyncio.create_task(second.compute(token_ids))
    await until(lambda: fabric.reads == 1, "blocks are coming")
    wants_logits = SamplingParams(temperature=0, seed=1, prompt_logprobs=0)  # of every token: nothing is fetched for it
    give_up(second, await second.compute(token_ids[: 2 * BLOCK + 3], sampling=wants_logits))
    arrives.set()
    answer = await fetching
    assert answer.cached_tokens == 5 * BLOCK
    assert dict(second.service.scheduler.index.entries()) == dict(zip(names, [b"", *names], strict=False))
    give_up(second, answer)


async def test_blocks_that_come_while_the_first_entry_is_written_are_told(
    cluster_workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, name = IndexShelf.entries, b"n" * 32

    def list_and_get_one(self: IndexShelf) -> list[tuple[bytes, bytes]]:
        def come() -> None:
            slabs = self.index.pools.try_take(BLOCK, tail_of=0)
            assert slabs is not None
            held = list(slabs)
            refs = self.seals.seal_block(held, [self.index.pools.generation(*slab) for slab in held], 0, name)
            self.index.extend([], name, refs)
            self.index.pools.give_back(slabs)

        asyncio.get_running_loop().call_soon(come)
        return list(entries(self))

    fabric = Fabric()
    with monkeypatch.context() as patch:
        patch.setattr(IndexShelf, "entries", list_and_get_one)
        first = await cluster_workers.prefill(fabric.open, worker_id="prefill-a")
    assert first.service.scheduler.index.find([name])
    second = await cluster_workers.prefill(fabric.open, worker_id="prefill-b")
    await until(lambda: second.service.peers.holders.runs([name]) != {}, "the block is known")


async def test_what_a_lease_is_not_over_is_not_taken(
    cluster_workers: Workers, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder that tells more blocks than its handle has."""
    pin = BlockSharing.Pin

    async def boast(self: BlockSharing, request: PinRequest, context: Context) -> PinResponse:
        told, names = len(request.prefix_hashes), request.prefix_hashes[:3]
        pinned = await pin(
            self, PinRequest(layout_fingerprint=request.layout_fingerprint, prefix_hashes=names), context
        )
        pinned.blocks = told
        return pinned

    monkeypatch.setattr(BlockSharing, "Pin", boast)
    first, second = await two(cluster_workers)
    token_ids = prompt(TOKENS)
    give_up(first, await first.compute(token_ids))
    await knows(second, first, token_ids, 5)
    answer = await second.compute(token_ids)
    assert answer.cached_tokens == 3 * BLOCK
    assert Oracle(tiny_model).first_wrong(token_ids, [answer.token_id]) is None
    give_up(second, answer)


@pytest.mark.parametrize("order", [(0, 1, 1), (0, 2), (1,), (0, 0)])
async def test_names_that_do_not_follow_each_other_are_no_run(order: tuple[int, ...], cluster_workers: Workers) -> None:
    worker = await cluster_workers.prefill(Fabric().open, codec="zip-4/32", block_tokens=64, step_tokens=64)
    token_ids = prompt(3 * 64 + 1)
    give_up(worker, await worker.compute(token_ids))
    names, fingerprint = names_of(worker, token_ids), worker.service.device.layout.fingerprint
    stub: Any = KvStoreServiceStub(worker.channels.get(worker.address))
    request = PinRequest(layout_fingerprint=fingerprint, prefix_hashes=[names[i] for i in order])
    with client_errors():
        pinned = await stub.Pin(request, timeout=5)
    assert pinned.blocks == {(0, 1, 1): 2, (0, 2): 1, (1,): 0, (0, 0): 1}[order]
    if pinned.blocks:
        give_up(worker, PrefillResponse(handle=pinned.handle))


async def test_tenants_share_nothing(cluster_workers: Workers) -> None:
    first, second = await two(cluster_workers)
    token_ids = prompt(TOKENS)
    give_up(first, await first.compute(token_ids, cache_salt="a"))
    await knows(second, first, token_ids, 5, salt="a")
    for salt, cached in (("b", 0), ("", 0), ("a", 5 * BLOCK)):
        answer = await second.compute(token_ids, cache_salt=salt)
        assert answer.cached_tokens == cached
        give_up(second, answer)
    stub: Any = KvStoreServiceStub(second.channels.get(first.address))
    fingerprint = first.service.device.layout.fingerprint
    for salt, blocks in (("b", 0), ("", 0), ("a", 5)):
        request = LookupRequest(layout_fingerprint=fingerprint, prefix_hashes=names_of(first, token_ids, salt))
        assert (await stub.Lookup(request, timeout=5)).blocks == blocks


@pytest.mark.parametrize("where", ["header", "payload"])
async def test_a_flipped_bit_is_never_lent(where: str, cluster_workers: Workers, tiny_model: Path) -> None:
    first, second = await two(cluster_workers)
    token_ids = prompt(TOKENS)
    known = await first.compute(token_ids)
    give_up(first, known)
    await knows(second, first, token_ids, 5)
    spoilt = claims_of(known.handle).refs[3]
    first.service.device.slab_view(SlabKind.BLOCK, spoilt.slab)[20 if where == "header" else 700] ^= 4
    answer = await second.compute(token_ids)
    assert answer.cached_tokens == 3 * BLOCK, "the blocks before it"
    assert Oracle(tiny_model).first_wrong(token_ids, [answer.token_id]) is None
    assert failures(first.service.metrics) == {"BLOCK_CORRUPT": 1}
    give_up(second, answer)


async def test_a_bit_that_flips_on_the_way_is_seen(
    cluster_workers: Workers, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await two(cluster_workers)
    token_ids = prompt(TOKENS)
    give_up(first, await first.compute(token_ids))
    await knows(second, first, token_ids, 5)
    transport = second.service.peers.transport
    read = transport.read

    async def flip(peer: str, ranges: Any, *args: Any) -> int:
        moved = await read(peer, ranges, *args)
        slab = second.service.device.cache.arenas.of(SlabKind.BLOCK)
        row = (ranges[1].local_address - slab.data_ptr()) // slab.shape[1]
        slab[row, 999] ^= 1
        return moved

    monkeypatch.setattr(transport, "read", flip)
    answer = await second.compute(token_ids)
    assert answer.cached_tokens == 0
    assert Oracle(tiny_model).first_wrong(token_ids, [answer.token_id]) is None
    assert fetches(second) == {"failed": 1}
    assert failures(second.service.metrics) == {"BLOCK_CORRUPT": 1}
    give_up(second, answer)
    again = await second.compute(token_ids)
    assert again.cached_tokens == 5 * BLOCK, "what it has computed itself"
    give_up(second, again)


async def test_a_holder_that_is_gone_costs_nothing_but_the_blocks(cluster_workers: Workers, tiny_model: Path) -> None:
    fabric, token_ids = Fabric(), prompt(TOKENS)
    second = await cluster_workers.prefill(fabric.open, worker_id="prefill-b")
    async with cluster_workers.a_prefill(fabric.open, worker_id="prefill-a") as first:
        give_up(first, await first.compute(token_ids))
        await knows(second, first, token_ids, 5)
        holders = dict(second.service.peers.holders.runs(names_of(first, token_ids)))
        assert len(holders) == 1
    key = next(iter(holders))
    second.service.peers.holders.add(key, b"", names_of(second, token_ids))  # as if nobody had noticed
    answer = await second.compute(token_ids)
    assert (answer.cached_tokens, fetches(second)) == (0, {"failed": 1})
    assert Oracle(tiny_model).first_wrong(token_ids, [answer.token_id]) is None
    give_up(second, answer)


async def test_a_full_pool_lends_no_room(cluster_workers: Workers) -> None:
    first, second = await two(cluster_workers)
    token_ids = prompt(TOKENS)
    give_up(first, await first.compute(token_ids))
    await knows(second, first, token_ids, 5)
    held = [await second.compute(prompt(6 * BLOCK, salt=i)) for i in range(1, 4)]  # 18 of its 24 blocks
    answers = [await second.compute(prompt(3 * BLOCK + 1, salt=8)), await second.compute(token_ids[: 2 * BLOCK])]
    assert second.service.load().free_blocks == 1
    late = asyncio.create_task(second.compute(token_ids))
    await until(lambda: second.service.load().queued_requests == 1, "it waits for room")
    give_up(second, *held, *answers)
    answer = await late
    assert answer.cached_tokens >= 1 * BLOCK
    give_up(second, answer)


async def test_what_was_generated_is_found_by_the_next_turn(cluster_workers: Workers, tiny_model: Path) -> None:
    """Prompt and answer are pulled from the decode worker, which holds both."""
    pair = await cluster_workers.pair(Fabric().open)
    other, token_ids = pair.prefill, prompt(TOKENS)
    prefilled = await other.compute(token_ids)
    answer = await pair.decode.tokens(prefilled, 3 * BLOCK, past_token_ids=token_ids)
    history = [*token_ids, prefilled.token_id, *answer]
    blocks = (len(history) - 1) // BLOCK  # the last token was never computed
    await knows(other, pair.decode, history[: blocks * BLOCK], blocks)
    turn = history + prompt(20, salt=5)
    again = await other.compute(turn)
    assert again.cached_tokens == blocks * BLOCK
    assert fetches(other) == {"fetched": 1}
    assert Oracle(tiny_model).first_wrong(turn, [again.token_id]) is None
    give_up(other, again)


async def test_what_was_generated_after_the_same_prompt_is_all_found(
    cluster_workers: Workers, tiny_model: Path
) -> None:
    """Also of sequences that come at once, each with blocks of its own for what they share."""
    pair, oracle = await cluster_workers.pair(Fabric().open), Oracle(tiny_model)
    base = prompt(3 * BLOCK)
    prompts = [base + prompt(5, salt=salt) for salt in range(1, 4)]
    prefilled = [await pair.prefill.compute(token_ids) for token_ids in prompts]
    answers = await asyncio.gather(
        *(
            pair.decode.tokens(answer, 3 * BLOCK, past_token_ids=token_ids)
            for answer, token_ids in zip(prefilled, prompts, strict=True)
        )
    )
    index = pair.decode.service.scheduler.index
    for token_ids, first, answer in zip(prompts, prefilled, answers, strict=True):
        tokens = [first.token_id, *answer]
        assert oracle.first_wrong(token_ids, tokens) is None
        names = names_of(pair.decode, [*token_ids, *tokens][:-1])  # the last token was never computed
        assert len(index.find(names)) == len(names) == 6


async def test_a_decode_worker_reads_only_what_it_lacks(cluster_workers: Workers, tiny_model: Path) -> None:
    pair = await cluster_workers.pair(Fabric().open)
    token_ids, oracle = prompt(TOKENS), Oracle(tiny_model)
    for turn, pulled in enumerate((5, 0)):
        prefilled = await pair.prefill.compute(token_ids)
        events = await pair.decode.events(prefilled, 8, past_token_ids=token_ids)
        assert events[0].pulled.blocks == pulled, f"turn {turn}"
        tokens = [token for event in events[1:-1] for token in event.tokens.token_ids]
        assert oracle.first_wrong(token_ids, [prefilled.token_id, *tokens]) is None


async def test_a_decode_worker_checks_what_it_has_before_it_builds_on_it(
    cluster_workers: Workers, tiny_model: Path
) -> None:
    pair = await cluster_workers.pair(Fabric().open)
    token_ids = prompt(TOKENS)
    prefilled = await pair.prefill.compute(token_ids)
    await pair.decode.tokens(prefilled, 4, past_token_ids=token_ids)
    index = pair.decode.service.scheduler.index
    spoilt = index.find(names_of(pair.decode, token_ids))[2].refs[0]
    pair.decode.service.device.slab_view(SlabKind.BLOCK, spoilt.slab)[500] ^= 1
    prefilled = await pair.prefill.compute(token_ids)
    events = await pair.decode.events(prefilled, 4, past_token_ids=token_ids)
    assert events[0].pulled.blocks == 3, "what it has no more"
    tokens = [token for event in events for token in event.tokens.token_ids]
    assert Oracle(tiny_model).first_wrong(token_ids, [prefilled.token_id, *tokens]) is None
    assert failures(pair.decode.service.metrics) == {"BLOCK_CORRUPT": 1}
    assert len(index.find(names_of(pair.decode, token_ids))) == 5


async def test_names_that_are_not_those_of_the_handle_are_refused(cluster_workers: Workers) -> None:
    pair = await cluster_workers.pair(Fabric().open)
    token_ids = prompt(TOKENS)
    prefilled = await pair.prefill.compute(token_ids)
    for wrong in (
        {"past_token_ids": token_ids[:-1]},
        {"past_token_ids": [*token_ids[:-1], 9]},
        {"past_token_ids": token_ids, "cache_salt": "x"},
    ):
        await pair.decode.refused(prefilled, InvalidRequestError, **wrong)
    assert len(pair.decode.service.scheduler.index) == 0
    give_up(pair.prefill, prefilled)


async def test_a_prompt_computed_on_a_decode_worker_reuses_what_is_there(
    cluster_workers: Workers, tiny_model: Path
) -> None:
    decode = await cluster_workers.decode(Fabric().open)
    token_ids, oracle = prompt(TOKENS), Oracle(tiny_model)
    for cached in (0, 5 * BLOCK, 2 * BLOCK):
        if cached == 2 * BLOCK:  # the third block is not what it was
            spoilt = decode.service.scheduler.index.find(names_of(decode, token_ids))[2].refs[0]
            decode.service.device.slab_view(SlabKind.BLOCK, spoilt.slab)[500] ^= 1
        request = decode.request(PrefillResponse(), 4, prompt_token_ids=token_ids)
        request.ClearField("handle")
        events = [event async for event in decode.stub.Decode(request, timeout=20)]
        computed = next(event.computed for event in events if event.WhichOneof("event") == "computed")
        tokens = [token for event in events for token in event.tokens.token_ids]
        assert oracle.first_wrong(token_ids, tokens) is None
        assert computed.cached_tokens == cached


async def test_a_prompt_computed_on_a_decode_worker_takes_what_others_have(
    cluster_workers: Workers, tiny_model: Path
) -> None:
    pair = await cluster_workers.pair(Fabric().open)
    token_ids = prompt(TOKENS)
    give_up(pair.prefill, await pair.prefill.compute(token_ids))
    names, holders = names_of(pair.prefill, token_ids), pair.decode.service.peers.holders
    await until(lambda: holders.runs(names) != {}, "the decode worker knows of the blocks")
    request = pair.decode.request(PrefillResponse(), 4, prompt_token_ids=token_ids)
    request.ClearField("handle")
    events = [event async for event in pair.decode.stub.Decode(request, timeout=20)]
    computed = next(event.computed for event in events if event.WhichOneof("event") == "computed")
    tokens = [token for event in events for token in event.tokens.token_ids]
    assert Oracle(tiny_model).first_wrong(token_ids, tokens) is None
    assert computed.cached_tokens == 5 * BLOCK


async def test_one_prefill_feeds_many_decode_workers(cluster_workers: Workers, tiny_model: Path) -> None:
    """Each reads the same slabs under a lease of its own; they are free when the last one has ended."""
    fabric, token_ids = Fabric(), prompt(TOKENS)
    prefill = await cluster_workers.prefill(fabric.open)
    decodes = [await cluster_workers.decode(fabric.open, worker_id=f"decode-{i}") for i in range(3)]
    answers = [await prefill.compute(token_ids) for _ in decodes]
    slabs = [[ref.slab for ref in claims_of(a.handle).refs if ref.kind == SLAB_KIND_BLOCK] for a in answers]
    assert slabs[0] == slabs[1] == slabs[2]
    assert prefill.service.load().leases == 3
    free = prefill.service.scheduler.pools.blocks.free
    oracle = Oracle(tiny_model)
    tokens = await asyncio.gather(*(d.tokens(a, 8) for d, a in zip(decodes, answers, strict=True)))
    assert all(oracle.first_wrong(token_ids, [answers[0].token_id, *some]) is None for some in tokens)
    assert prefill.service.load().leases == 0
    assert prefill.service.scheduler.pools.blocks.free == free, "the index goes on holding them"
