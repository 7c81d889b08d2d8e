"""The handoff of zipped blocks over real NIXL: quantized once, moved as they are, verified, attended as they are."""

import asyncio
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from workers import Gate, Workers, claims_of, failures, prompt, value
from zipserve.common import errors
from zipserve.common.kv.header import SlabIdentity, verify
from zipserve.common.kv.layout import CODECS, HEADER_BYTES, SLAB_ALIGNMENT_BYTES, Layout, SlabKind
from zipserve.common.sampling import Sampling
from zipserve.common.transport import ArenaInfo, Range, Transport
from zipserve.common.transport.nixl import NixlTransport
from zipserve.decode.scheduler import Place
from zipserve.engine.cache import KvCache
from zipserve.engine.codec import Arenas, codec_for
from zipserve.engine.device import WorkerSettings
from zipserve.engine.engine import Engine
from zipserve.engine.sampling import Sampler, sample
from zipserve.engine.sequence import Segment, Sequence
from zipserve.v1.decode_service_pb2 import DecodeResponse
from zipserve.v1.kv_pb2 import BlockRef, KvClaims

BLOCK = 64
ZIPPED = {"codec": "zip-4/32", "block_tokens": BLOCK, "kv_sinks": 5}
TOKENS = 150
"""Sinks, two blocks, and a tail of 22."""
KINDS = [SlabKind.SINKS, SlabKind.BLOCK, SlabKind.BLOCK, SlabKind.TAIL]


def test_zip_is_the_default() -> None:
    assert WorkerSettings.model_fields["codec"].default == "zip-4/32"


@pytest.mark.parametrize("codec", CODECS)
async def test_bytes_on_the_wire_are_those_of_the_layout(cluster_workers: Workers, codec: str) -> None:
    """As NIXL counts them."""
    settings = {**ZIPPED, "codec": codec}
    pair = await cluster_workers.pair(prefill=settings, decode=settings)
    prefilled = await pair.prefill.compute(TOKENS)
    refs = claims_of(prefilled.handle).refs
    assert [SlabKind(ref.kind) for ref in refs] == (KINDS if codec.startswith("zip-") else KINDS[1:])
    events = await pair.decode.events(prefilled)
    wanted = pair.decode.service.device.layout.sequence_bytes(TOKENS)
    assert events[0].pulled.bytes == wanted
    assert value(pair.decode.service.metrics, "zipserve_kv_transfer_bytes_total", source="prefill") == wanted


@pytest.mark.parametrize("index", range(4), ids=["sinks", "first-block", "last-block", "tail"])
@pytest.mark.parametrize("where", [HEADER_BYTES, 1000, -1])
async def test_a_flipped_bit_in_any_slab_is_refused(cluster_workers: Workers, index: int, where: int) -> None:
    pair = await cluster_workers.pair(prefill=ZIPPED, decode=ZIPPED)
    prefilled = await pair.prefill.compute(TOKENS)
    ref = claims_of(prefilled.handle).refs[index]
    pair.prefill.service.device.slab_view(SlabKind(ref.kind), ref.slab)[: ref.bytes][where] ^= 4
    await pair.decode.refused(prefilled, errors.BlockCorruptError)
    assert failures(pair.decode.service.metrics) == {"BLOCK_CORRUPT": 1}
    await pair.settled()
    assert len((await pair.hand_over(TOKENS))[1]) == 8


async def test_another_profile_is_refused(cluster_workers: Workers) -> None:
    pair = await cluster_workers.pair(prefill=ZIPPED, decode={**ZIPPED, "codec": "zip-4/3"})
    prefilled = await pair.prefill.compute(TOKENS)
    await pair.decode.refused(prefilled, errors.LayoutMismatchError)
    pair.prefill.service.source.release_handle(prefilled.handle)


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 130])
async def test_tokens_are_those_of_one_engine(cluster_workers: Workers, tokens: int) -> None:
    """As if prefill and decode had shared a cache; with a tail between them, as if it had been coded in 8 bits."""
    pair = await cluster_workers.pair(prefill=ZIPPED, decode=ZIPPED)
    first, rest = await pair.hand_over(tokens, 16)
    device = pair.prefill.service.device
    engine = Engine(device._model, KvCache(device.layout, 4, 1, 1, 1))
    sequence = Sequence([0, 1, 2, 3], 0, sinks=0)
    found, inputs = [], prompt(tokens)
    for position in range(tokens, tokens + 17):
        logits = engine.forward([Segment(sequence, inputs)]).logits
        if position == tokens and tokens % BLOCK:
            engine.cache.pack_tail(0, tokens % BLOCK, 0)
            engine.cache.unpack_tail(0, tokens % BLOCK, 0)
        inputs = sample(logits, [Sampler(Sampling(temperature=0))], [position])
        found += inputs
    assert [first.token_id, *rest] == found


async def test_blocks_survive_prefill_decode_and_a_store_bit_by_bit(cluster_workers: Workers) -> None:
    """Pulled by decode, then from there by a third party that has no model, which verifies and keeps them."""
    pair = await cluster_workers.pair(prefill=ZIPPED, decode=ZIPPED)
    prefilled = await pair.prefill.compute(TOKENS)
    claims, source = claims_of(prefilled.handle), pair.prefill.service.device
    sent = [bytes(source.slab_view(SlabKind(ref.kind), ref.slab)[: ref.bytes]) for ref in claims.refs]
    gate = Gate(pair.decode.service.device)
    running = asyncio.create_task(pair.decode.events(prefilled))
    try:
        await gate.entered()  # everything is pulled and verified, and the sequence is in its first step
        (ticket,) = pair.decode.service.scheduler._tickets[Place.RUNNING]
        slabs = ticket.slabs
        places = [*((SlabKind.SINKS, s) for s in slabs.sinks), *((SlabKind.BLOCK, s) for s in slabs.blocks[:2])]
        held = [bytes(pair.decode.service.device.slab_view(*place)) for place in places]
        assert [data[: len(part)] for data, part in zip(held, sent, strict=False)] == sent[:3]
        stored = await store(pair.decode.service.peers.transport, pair.decode.service.device.arenas, places, claims)
        assert stored == sent[:3]
    finally:
        gate.open()
        events: list[DecodeResponse] = await running
    assert events[-1].WhichOneof("event") == "finished"
    assert_decodes_alike(pair.prefill.service.device.layout, sent, stored)


async def store(
    peer: Transport, arenas: list[ArenaInfo], places: list[tuple[SlabKind, int]], claims: KvClaims
) -> list[bytes]:
    """Reads slabs of a decode worker into memory of its own, as a store does, and verifies them by the first handle."""
    by_kind = {arena.kind: arena for arena in arenas}
    sizes = [by_kind[kind].slab_bytes for kind, _ in places]
    space = np.zeros(sum(sizes) + SLAB_ALIGNMENT_BYTES, np.uint8)
    start = -space.ctypes.data % SLAB_ALIGNMENT_BYTES
    memory = space[start : start + sum(sizes)]
    own = ArenaInfo(SlabKind.BLOCK, memory.ctypes.data, sum(sizes), 1, "DRAM")
    with ExitStack() as stack:
        transport = NixlTransport("store", [own])
        stack.callback(transport.close)
        name = await transport.connect(peer.metadata())
        peer.expect_readers(True)
        ranges, at = [], 0
        for (kind, slab), size, ref in zip(places, sizes, claims.refs, strict=False):
            ranges.append(Range(by_kind[kind].address(slab), 0, own.base_address + at, 0, ref.bytes))
            at += size
        moved_bytes = await transport.read(name, ranges, ("DRAM", "DRAM"), 5.0)
        assert moved_bytes == sum(one.size_bytes for one in ranges)
        peer.expect_readers(False)
    starts = [one.local_address - own.base_address for one in ranges]
    found = [memory[at : at + one.size_bytes] for at, one in zip(starts, ranges, strict=True)]
    for data, ref in zip(found, claims.refs, strict=False):
        verify(data.data, identity(claims, ref), ref.checksum)
    return [bytes(data) for data in found]


def identity(claims: KvClaims, ref: BlockRef) -> SlabIdentity:
    return SlabIdentity(
        SlabKind(ref.kind), claims.layout_fingerprint, claims.incarnation, ref.generation, ref.start_position,
        ref.tokens, ref.bytes - HEADER_BYTES, ref.prefix_hash,
    )  # fmt: skip


def assert_decodes_alike(layout: Layout, sent: list[bytes], stored: list[bytes]) -> None:
    decoded = []
    for slabs in (sent, stored):
        arenas = Arenas.allocate(layout, blocks=1, tails=0, sinks=1)
        for arena, data in ((arenas.sinks, slabs[0]), (arenas.blocks, slabs[1])):
            arena[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        zero = torch.zeros(1, dtype=torch.int64)
        decoded.append(codec_for(layout, arenas).read_blocks(1, zero, zero)[0])
    assert torch.equal(*decoded)
