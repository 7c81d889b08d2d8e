"""Everything that can be wrong with a handoff, over real NIXL: each fault has its own error and counter, no token is
made from it, nothing leaks, and the next honest handle works."""

from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hooked_nixl import Hooks
from oracle import Oracle
from polling import until
from workers import Pair, claims_of, failures, prompt, workers
from zipserve.common import errors
from zipserve.common.kv.handle import sign
from zipserve.common.kv.layout import SlabKind
from zipserve.v1.kv_pb2 import KvHandle
from zipserve.v1.prefill_service_pb2 import PrefillResponse

TOKENS = 40
"""Two blocks of 16 and a tail of 8."""


def slab(pair: Pair, prefilled: PrefillResponse, index: int) -> memoryview:
    """The bytes that a reference of the handle names, in the prefill worker's memory."""
    ref = claims_of(prefilled.handle).refs[index]
    return pair.prefill.service.device.slab_view(SlabKind(ref.kind), ref.slab)[: ref.bytes]


async def refused(pair: Pair, prefilled: PrefillResponse, error: type[errors.ZipserveError]) -> errors.ZipserveError:
    """The handle must fail with exactly this error and count; afterwards an honest one works and nothing is held."""
    before = failures(pair.decode.service.metrics).get(error.reason, 0)
    raised = await pair.decode.refused(prefilled, error)
    assert failures(pair.decode.service.metrics) == {error.reason: before + 1}
    await pair.settled()
    await honest(pair)
    assert isinstance(raised, errors.ZipserveError)
    assert raised.replayable
    return raised


async def honest(pair: Pair) -> None:
    first, rest = await pair.hand_over(prompt(TOKENS, salt=9))
    assert len(rest) == 8
    assert first.token_id >= 0


@asynccontextmanager
async def a_pair(tiny_model: Path, redis_url: str, cluster: str, **options: Any) -> Any:
    async with workers(tiny_model, redis_url, cluster) as cluster_workers:
        hooks = options.pop("hooks", None)
        yield await (cluster_workers.pair(hooks.open, **options) if hooks else cluster_workers.pair(**options))


@pytest.fixture
def open_pair(tiny_model: Path, redis_url: str, cluster: str) -> Callable[..., Any]:
    """Starts a prefill and a decode worker."""
    return lambda **options: a_pair(tiny_model, redis_url, cluster, **options)


async def test_an_honest_handoff_gives_the_right_tokens(open_pair: Callable[..., Any], tiny_model: Path) -> None:
    async with open_pair() as pair:
        first, rest = await pair.hand_over(prompt(TOKENS), 24)
        assert Oracle(tiny_model).first_wrong(prompt(TOKENS), [first.token_id, *rest]) is None
        assert failures(pair.decode.service.metrics) == {}


@pytest.mark.parametrize("index", [0, 1, 2], ids=["first-block", "last-block", "tail"])
@pytest.mark.parametrize("where", ["magic", "generation", "padding", "checksum", "first", "last"])
async def test_a_flipped_bit_is_refused(open_pair: Callable[..., Any], index: int, where: str) -> None:
    async with open_pair() as pair:
        prefilled = await pair.prefill.compute(TOKENS)
        view = slab(pair, prefilled, index)
        offsets = {"magic": 1, "generation": 33, "padding": 110, "checksum": 125, "first": 128, "last": len(view) - 1}
        view[offsets[where]] ^= 1 << (index + 2)
        await refused(pair, prefilled, errors.BlockCorruptError)


async def test_swapped_blocks_are_refused(open_pair: Callable[..., Any]) -> None:
    async with open_pair() as pair:
        prefilled = await pair.prefill.compute(TOKENS)
        one, other = slab(pair, prefilled, 0), slab(pair, prefilled, 1)
        one[:], other[:] = bytes(other), bytes(one)
        await refused(pair, prefilled, errors.BlockSwappedError)


async def test_a_block_of_another_sequence_is_refused(open_pair: Callable[..., Any]) -> None:
    async with open_pair() as pair:
        prefilled, foreign = await pair.prefill.compute(TOKENS), await pair.prefill.compute(prompt(TOKENS, salt=1))
        slab(pair, prefilled, 0)[:] = bytes(slab(pair, foreign, 0))
        pair.prefill.service.source.release_handle(foreign.handle)
        await refused(pair, prefilled, errors.BlockStaleError)


@pytest.mark.parametrize("reused", [False, True], ids=["freed", "reused"])
async def test_a_slab_freed_under_the_reader_is_refused(open_pair: Callable[..., Any], reused: bool) -> None:
    """Although the lease lives: by a source that is wrong about its slabs."""
    hooks = Hooks()
    async with open_pair(hooks=hooks, prefill={"kv_blocks": 2, "kv_tails": 1}) as pair:
        prefilled = await pair.prefill.compute(TOKENS)

        second: list[PrefillResponse] = []

        async def free() -> None:
            hooks.before = Hooks.before
            pair.prefill.free_lent(claims_of(prefilled.handle).lease_id)
            if reused:
                second.append(await pair.prefill.compute(prompt(TOKENS, salt=1)))

        hooks.before = free
        raised = await pair.decode.refused(prefilled, errors.BlockStaleError)
        assert ("has been freed" in str(raised)) is not reused
        assert failures(pair.decode.service.metrics) == {"BLOCK_STALE": 1}
        for other in second:
            slabs, again = ([ref.slab for ref in claims_of(p.handle).refs] for p in (prefilled, other))
            assert sorted(slabs) == sorted(again)
            assert len(await pair.decode.tokens(other)) == 8
        await pair.settled()
        await honest(pair)


async def test_a_handle_of_a_former_life_is_refused(tiny_model: Path, redis_url: str, cluster: str) -> None:
    async with workers(tiny_model, redis_url, cluster) as cluster_workers:
        decode = await cluster_workers.decode()
        async with cluster_workers.a_prefill(check=False, drain_s=0.0) as former:
            prefilled = await former.compute(TOKENS)
        pair = Pair(await cluster_workers.prefill(), decode)
        worker_id, incarnation = former.settings.worker_id, pair.prefill.service.device.incarnation
        assert pair.prefill.settings.worker_id == worker_id
        view = decode.service.peers.registry
        assert view is not None
        # until the decode worker knows the new life, it finds the old one unreachable
        await until(lambda: (r := view.find(worker_id)) is not None and r.incarnation == incarnation, "it is known")
        await refused(pair, prefilled, errors.IncarnationError)


async def test_an_expired_lease_is_refused(open_pair: Callable[..., Any]) -> None:
    async with open_pair(prefill={"lease_ttl_s": 0.3}) as pair:
        prefilled = await pair.prefill.compute(TOKENS)
        await until(lambda: pair.prefill.service.load().leases == 0, "the lease has expired")
        await refused(pair, prefilled, errors.LeaseExpiredError)


async def test_a_lease_that_ends_during_the_read_voids_it(open_pair: Callable[..., Any]) -> None:
    hooks = Hooks()
    async with open_pair(hooks=hooks) as pair:
        prefilled = await pair.prefill.compute(TOKENS)

        async def end() -> None:
            hooks.after = Hooks.after
            pair.prefill.service.source.release_handle(prefilled.handle)

        hooks.after = end
        await refused(pair, prefilled, errors.LeaseExpiredError)


def _changed(handle: KvHandle) -> KvHandle:
    claims = claims_of(handle)
    claims.refs[0].slab += 1
    return KvHandle(claims=claims.SerializeToString(), mac=handle.mac)


FORGERIES: dict[str, Callable[[KvHandle], KvHandle]] = {
    "claims": _changed,
    "mac": lambda handle: KvHandle(claims=handle.claims, mac=bytes([handle.mac[0] ^ 1]) + handle.mac[1:]),
    "no-mac": lambda handle: KvHandle(claims=handle.claims),
    "other-secret": lambda handle: sign(claims_of(handle), b"somebody else's secret"),
    "empty": lambda handle: KvHandle(),  # noqa: ARG005
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_forged_handle_is_refused(open_pair: Callable[..., Any], forgery: str) -> None:
    async with open_pair() as pair:
        prefilled = await pair.prefill.compute(TOKENS)
        forged = PrefillResponse(token_id=prefilled.token_id, handle=FORGERIES[forgery](prefilled.handle))
        with pytest.raises(AssertionError):
            assert forged.handle == prefilled.handle
        await pair.decode.refused(forged, errors.HandleForgedError)
        assert failures(pair.decode.service.metrics) == {"HANDLE_FORGED": 1}
        assert len(await pair.decode.tokens(prefilled)) == 8, "the honest handle is not harmed by a forged copy"
        await pair.settled()


@pytest.mark.parametrize("other", [{"block_tokens": 32}, {"dtype": "bfloat16"}], ids=["block", "dtype"])
async def test_a_foreign_layout_is_refused(open_pair: Callable[..., Any], other: dict[str, Any]) -> None:
    async with open_pair(decode=other) as pair:
        prefilled = await pair.prefill.compute(TOKENS)
        await pair.decode.refused(prefilled, errors.LayoutMismatchError)
        assert failures(pair.decode.service.metrics) == {"LAYOUT_MISMATCH": 1}
        pair.prefill.service.source.release_handle(prefilled.handle)
        with pytest.raises(errors.LayoutMismatchError):
            await pair.prefill.compute(TOKENS, layout_fingerprint=pair.decode.service.device.layout.fingerprint)
        await pair.settled()
