"""Without prefill workers: decode workers compute the prompts themselves, and take over from one that is killed."""

import asyncio
from pathlib import Path

from oracle import Oracle
from polling import until
from processes import Processes
from streams import Streamed, collect, request
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub

LENGTHS = (1, 5, 127, 128, 300, 700, 1500, 40)
TOKENS = 150


def prompt(index: int) -> list[int]:
    return [3 + (index * 31 + i * (7 + index % 5)) % 250 for i in range(LENGTHS[index])]


async def test_prompts_are_computed_and_replayed_by_decode_workers(
    redis_url: str, cluster: str, tiny_model: Path, tmp_path: Path
) -> None:
    overrides = (("router", "local_prefill_tokens_max", "-1"),)
    async with (
        Processes(redis_url, tiny_model, tmp_path, cluster=cluster, overrides=overrides) as stack,
        ChannelPool(4 << 20) as channels,
    ):
        await stack.start("decode-0", "decode-1")
        await stack.start("router")  # after them: its first look at the registry shows both, and each gets streams
        stub = InferenceServiceStub(channels.get(stack.router))
        tokens = [0] * len(LENGTHS)

        async def ask(index: int) -> Streamed:
            def count(so_far: int) -> None:
                tokens[index] = so_far

            return await collect(stub, request(prompt(index), TOKENS), on_tokens=count)

        streams = asyncio.gather(*(ask(index) for index in range(len(LENGTHS))))
        await until(lambda: sum(tokens) > 50, "the streams are under way", timeout_s=60)
        assert max(tokens) < TOKENS, "none has ended yet"
        stack.kill("decode-1")
        answers = await streams
    assert sum(answer.finished.usage.replays for answer in answers) > 0
    oracle = Oracle(tiny_model)
    for index, answer in enumerate(answers):
        assert len(answer.token_ids) == TOKENS
        assert oracle.first_wrong(prompt(index), answer.token_ids) is None
        assert answer.finished.kv_transfer.bytes == 0
