"""Services scale on their own: load spreads, a new worker is used at once, a stopped one is drained."""

import asyncio
import json
import signal
import time
from collections import Counter
from pathlib import Path

from oracle import Oracle
from polling import until
from processes import Processes
from streams import collect, request
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub

PROMPT = [3 + i * 11 % 250 for i in range(400)]
USED_WITHIN_S = 2.0


def served(stack: Processes) -> Counter[str]:
    """How many requests each worker has taken part in, as the router has logged it."""
    lines = [json.loads(line) for line in stack.log("router").splitlines() if '"request.finished"' in line]
    return Counter(line[key] for line in lines for key in ("prefill_worker", "decode_worker"))


async def test_load_spreads_and_late_and_leaving_workers_are_handled(
    redis_url: str, cluster: str, tiny_model: Path, tmp_path: Path
) -> None:
    # By load alone: else equal prompts would go to the worker that has their blocks.
    overrides = (("router", "prefix_names_max", "0"), ("router", "fetch_cost", "0"))
    async with (
        Processes(redis_url, tiny_model, tmp_path, cluster=cluster, overrides=overrides) as stack,
        ChannelPool(4 << 20) as channels,
    ):
        await stack.start("prefill-0", "prefill-1", "decode-0", "decode-1")
        await stack.start("router")  # after them: its first look at the registry shows all
        stub = InferenceServiceStub(channels.get(stack.router))
        expected = (await collect(stub, request(PROMPT, 600))).token_ids
        assert Oracle(tiny_model).first_wrong(PROMPT, expected) is None

        async def ask(tokens: int) -> None:
            answer = await collect(stub, request(PROMPT, tokens))
            assert answer.token_ids == expected[:tokens]

        before = served(stack)
        await asyncio.gather(*(ask(200) for _ in range(8)))
        spread = served(stack) - before
        assert (spread["decode-0"], spread["decode-1"]) == (4, 4)
        # prompts go to whoever has less to compute: a worker that is done with its first one sooner gets one more
        assert sorted((spread["prefill-0"], spread["prefill-1"])) in ([4, 4], [3, 5]), spread

        await stack.start("decode-2")
        started_s = time.monotonic()
        while not served(stack)["decode-2"]:
            assert time.monotonic() - started_s < USED_WITHIN_S, "a worker that started later is not used"
            await asyncio.gather(*(ask(4) for _ in range(3)))

        # one of each kind is stopped under load: nothing fails, nothing is lost
        load = [asyncio.create_task(ask(600)) for _ in range(12)]
        await until(lambda: busy(stack, "decode-1"), "decode-1 has work", timeout_s=30)
        stack.signal("decode-1", signal.SIGTERM)
        stack.signal("prefill-1", signal.SIGTERM)
        more = [asyncio.create_task(ask(100)) for _ in range(12)]
        await asyncio.gather(*load, *more)
        for name in ("decode-1", "prefill-1"):
            assert await stack.wait(name) == 0
            assert '"complete": true' in stack.log(name)
        await ask(50)


def busy(stack: Processes, name: str) -> bool:
    record = stack.view.find(name)
    return record is not None and record.load.running_requests > 0
