from pathlib import Path
import pytest
from memory_transport import Fabric
from oracle import Oracle
from workers import prompt, workers, failures
from zipserve.common.transport.nixl import NixlTransport

@pytest.mark.parametrize("which", ["memory", "nixl"])
async def test_main(which: str, tiny_model: Path, redis_url: str, cluster: str) -> None:
    async with workers(tiny_model, redis_url, cluster) as w:
        pair = await w.pair(Fabric().open if which == "memory" else NixlTransport)
        p, t = await pair.hand_over(40, 30)
        assert Oracle(tiny_model).first_wrong(prompt(40), [p.token_id, *t]) is None
