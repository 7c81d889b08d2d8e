"""A worker whose loop has died by a defect must not stand there as one that serves."""

from typing import Any

import pytest

from memory_transport import Fabric
from workers import Workers
from zipserve.common import errors


def _fail(*_: Any) -> None:
    raise RuntimeError("a defect")


async def test_a_prefill_worker_ends_with_its_loop(cluster_workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lives() -> None:
        async with cluster_workers.a_prefill(Fabric().open, check=False) as prefill:
            monkeypatch.setattr(prefill.service.scheduler, "next_step", _fail)
            with pytest.raises(errors.UnavailableError):
                await prefill.compute(40)

    with pytest.raises(errors.InternalError, match="prefill-loop has ended") as raised:
        await lives()
    assert str(raised.value.__cause__) == "a defect"


async def test_a_decode_worker_ends_with_its_loop(cluster_workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = Fabric()
    prefill = await cluster_workers.prefill(fabric.open)

    async def lives() -> None:
        async with cluster_workers.a_decode(fabric.open, check=False) as decode:
            monkeypatch.setattr(decode.service.scheduler, "grow", _fail)
            prefilled = await prefill.compute(40)
            with pytest.raises(errors.UnavailableError):
                await decode.events(prefilled)

    with pytest.raises(errors.InternalError, match="decode-loop has ended"):
        await lives()
    await prefill.settled()
