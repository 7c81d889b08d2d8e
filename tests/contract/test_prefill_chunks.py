"""A prefill worker whose prompts take several steps: the answers are the same, and nobody holds the others up."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from memory_transport import Fabric
from oracle import Oracle
from polling import until
from workers import Prefill, Workers, prompt, value
from zipserve.common import errors
from zipserve.common.rpc.channel import Deadline
from zipserve.common.sampling import Sampling
from zipserve.engine.sampling import Sampler
from zipserve.v1.prefill_service_pb2 import PrefillResponse

STEP = 32
LONG = 200
"""Tokens of a prompt that takes seven steps."""


class Pace:
    """Lets a device's forward passes happen one by one, and counts the tokens of each."""

    def __init__(self, worker: Prefill) -> None:
        self.steps: list[list[int]] = []
        """Tokens of the segments of each step."""
        self.seconds = 0.0
        """How much slower every step is."""
        forward = worker.service.device.engine.forward

        def paced(segments: Any) -> Any:
            self.steps.append([len(segment.token_ids) for segment in segments])
            time.sleep(self.seconds)
            return forward(segments)

        worker.service.device.engine.forward = paced  # type: ignore[method-assign]


@pytest.fixture
async def prefill(cluster_workers: Workers) -> Prefill:
    return await cluster_workers.prefill(Fabric().open, step_tokens=STEP, prefix_blocks_max=0)


def start(worker: Prefill, tokens: int | list[int], **options: Any) -> "asyncio.Task[PrefillResponse]":
    return asyncio.create_task(worker.compute(tokens, **options))


def give_up(worker: Prefill, *answers: PrefillResponse) -> None:
    for answer in answers:
        worker.service.source.release_handle(answer.handle)


async def test_the_token_is_that_of_the_whole_prompt(prefill: Prefill, tiny_model: Path) -> None:
    oracle, pace = Oracle(tiny_model), Pace(prefill)
    for tokens in (STEP - 1, STEP, STEP + 1, 2 * STEP, LONG):
        pace.steps.clear()
        answer = await prefill.compute(tokens)
        assert oracle.first_wrong(prompt(tokens), [answer.token_id]) is None
        assert [sum(step) for step in pace.steps] == [STEP] * (tokens // STEP) + [tokens % STEP] * (tokens % STEP > 0)
        give_up(prefill, answer)


async def test_prompts_of_all_lengths_at_once(prefill: Prefill, tiny_model: Path) -> None:
    oracle = Oracle(tiny_model)
    prompts = [prompt(tokens, salt) for salt, tokens in enumerate((LONG, 5, 60, 33, 1, 16))]
    answers = await asyncio.gather(*(prefill.compute(token_ids) for token_ids in prompts))
    for token_ids, answer in zip(prompts, answers, strict=True):
        assert oracle.first_wrong(token_ids, [answer.token_id]) is None
    give_up(prefill, *answers)


async def test_a_short_prompt_does_not_wait_for_a_long_one(prefill: Prefill) -> None:
    pace = Pace(prefill)
    pace.seconds = 0.02
    long = start(prefill, LONG)
    await until(lambda: len(pace.steps) > 0, "the long one is being computed")
    short = await prefill.compute(10)
    assert not long.done()
    assert [STEP - 10, 10] in pace.steps, "the long one did not advance beside the short one"
    give_up(prefill, short, await long)


async def test_a_higher_priority_overtakes(prefill: Prefill) -> None:
    pace = Pace(prefill)
    pace.seconds = 0.02
    usual = start(prefill, LONG)
    await until(lambda: len(pace.steps) > 0, "the usual one is being computed")
    urgent = await prefill.compute(prompt(LONG // 2, salt=1), priority=1)
    assert not usual.done()
    give_up(prefill, urgent, await usual)


@pytest.mark.parametrize("timeout_s", [20.0, 0.2])
async def test_a_caller_that_goes_away_between_two_steps_frees_everything(prefill: Prefill, timeout_s: float) -> None:
    pace = Pace(prefill)
    pace.seconds = 0.05
    task = start(prefill, LONG, timeout_s=timeout_s)
    await until(lambda: len(pace.steps) > 0, "it has had a step")
    if timeout_s > 1:
        task.cancel()
    with pytest.raises((asyncio.CancelledError, errors.DeadlineError)):
        await task
    await prefill.settled()
    assert len(pace.steps) < LONG // STEP, "it was computed to its end"
    metrics = prefill.service.metrics
    assert value(metrics, "zipserve_running_requests") == 0
    assert value(metrics, "zipserve_kv_blocks_free") == prefill.settings.kv_blocks


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(prefill: Prefill) -> None:
    pace = Pace(prefill)
    pace.seconds = 0.1
    give_up(prefill, await prefill.compute(STEP))
    steps = len(pace.steps)
    says = r"200 tokens behind 0 others takes 0\.[3-9]\d s at least, its deadline is in 0\.[12]"
    with pytest.raises(errors.DeadlineError, match=says):
        await prefill.service.worker.prefill("r", prompt(LONG), [Sampler(Sampling())], Deadline(0.2))
    assert len(pace.steps) == steps


async def test_a_failing_chunk_fails_its_prompt(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = prefill.service.device.engine
    forward, calls = engine.forward, iter(range(100))

    def fail_third(*args: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("out of luck")
        return forward(*args)

    monkeypatch.setattr(engine, "forward", fail_third)
    with pytest.raises(errors.UnavailableError, match="worker's log"):
        await prefill.compute(LONG)
    await prefill.settled()
    give_up(prefill, await prefill.compute(LONG))
