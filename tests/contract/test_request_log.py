"""The one line of a request in the router's log, and what is counted of it: every way in which a request can end."""

import asyncio
import re
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from polling import until
from router_cluster import Cluster, answer, build, refusal
from zipserve.common.errors import DeadlineError, WorkerLostError
from zipserve.common.models import ModelFiles
from zipserve.common.rpc.channel import Deadline
from zipserve.router.caller import Caller
from zipserve.v1.inference_service_pb2 import GenerateRequest, TokenIds
from zipserve.v1.sampling_pb2 import Guide, SamplingParams, StopConditions

_PAGE = Path(__file__).parents[2] / "docs" / "logging.md"
SECRET_TEXT = "the password of the vault"
TEN = StopConditions(max_tokens=10, ignore_eos=True)


@pytest.fixture
async def cluster(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> Cluster:
    cluster = await build(stack, model, redis_url)
    await cluster.add("p0", cached_tokens=4)
    await cluster.add("d0")
    return cluster


def finished(lines: list[Any]) -> dict[str, Any]:
    """The line of the only request."""
    (line,) = [dict(line) for line in lines if line["event"] == "request.finished"]
    return line


def value(cluster: Cluster, name: str, **labels: str) -> float:
    return cluster.service.metrics.registry.get_sample_value(f"zipserve_{name}", labels) or 0.0


def documented() -> set[str]:
    """Keys of the router's line."""
    section = _PAGE.read_text().split("## `request.finished`")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


async def test_a_complete_request_has_every_documented_key_and_no_text(cluster: Cluster) -> None:
    stop = StopConditions(max_tokens=10, stop=[SECRET_TEXT], ignore_eos=True)
    sampling = SamplingParams(temperature=0.5, seed=7, logit_bias={5: 1.0})
    with capture_logs() as lines:
        await answer(cluster.generate(text=SECRET_TEXT, stop=stop, sampling=sampling))
        await until(lambda: any(line["event"] == "request.finished" for line in lines), "it is logged")
    line = finished(lines)
    assert set(line) - {"event", "log_level"} == documented()
    assert SECRET_TEXT not in str(lines)
    assert (line["outcome"], line["reason"], line["stop"], line["api"]) == ("OK", "LENGTH", "length", "grpc")
    assert line["sampling"] == {"temperature": 0.5, "seed": 7, "logit_bias": 1}
    assert (line["prompt_tokens"], line["completion_tokens"], line["cached_tokens"]) == (len(SECRET_TEXT), 10, 4)
    assert (line["prefill_worker"], line["decode_worker"], line["kv_bytes"]) == ("p0", "d0", 4096)
    assert line["itl_mean_s"] <= line["itl_max_s"] <= line["decode_s"] + 1e-4
    assert line["first_token_s"] + line["decode_s"] <= line["seconds"] + 2e-4
    assert value(cluster, "requests_total", caller="", reason="OK") == 1
    assert value(cluster, "choices_finished_total", reason="LENGTH") == 1
    assert value(cluster, "inter_token_seconds_count") == 9
    assert value(cluster, "request_seconds_count") == value(cluster, "queue_seconds_count") == 1
    assert value(cluster, "caller_tokens_total", caller="", kind="generated") == 10
    assert value(cluster, "cached_prompt_tokens_total") == 4


async def test_tokens_that_come_together_are_no_time_apart(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str
) -> None:
    cluster = await build(stack, model, redis_url)
    await cluster.add("p0")
    await cluster.add("d0", tokens_per_event=3)
    await answer(cluster.generate(stop=TEN))
    assert value(cluster, "inter_token_seconds_count") == 9
    assert value(cluster, "inter_token_seconds_bucket", le="0.001") >= 6


async def test_a_replayed_request_says_why(cluster: Cluster) -> None:
    failed: list[object] = []

    async def fail_once(position: object) -> None:
        if position == 14 and not failed:
            failed.append(position)
            raise WorkerLostError("gone")

    peer = await cluster.add("d1", at_token=fail_once)
    with capture_logs() as lines:
        while not failed:
            lines.clear()
            await answer(cluster.generate(stop=TEN))
        await until(lambda: any(line["event"] == "request.finished" for line in lines), "it is logged")
    line = finished(lines)
    assert (line["outcome"], line["replays"], line["replay_reasons"]) == ("OK", 1, {"WORKER_LOST": 1})
    assert peer.requests


async def test_a_cancelled_request(cluster: Cluster) -> None:
    with capture_logs() as lines:
        call = cluster.generate(stop=StopConditions(max_tokens=400, ignore_eos=True))
        async for response in call:
            if response.HasField("delta"):
                break
        call.cancel()
        await until(lambda: any(line["event"] == "request.finished" for line in lines), "it is logged")
    line = finished(lines)
    assert (line["outcome"], line["reason"]) == ("CANCELLED", "CANCELLED")
    assert value(cluster, "requests_total", caller="", reason="CANCELLED") == 1
    assert value(cluster, "request_seconds_count") == 0


async def test_a_refused_request(cluster: Cluster) -> None:
    with capture_logs() as lines:
        assert (await refusal(cluster.generate(model="other"))).reason == "MODEL_NOT_FOUND"
    line = finished(lines)
    assert (line["outcome"], line["reason"]) == ("MODEL_NOT_FOUND", "MODEL_NOT_FOUND")
    assert "prompt_tokens" not in line
    assert value(cluster, "requests_rejected_total", reason="MODEL_NOT_FOUND") == 1


@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_a_deadline_that_passes_is_counted_where_it_passed(
    stage: str, stack: AsyncExitStack, model: ModelFiles, redis_url: str
) -> None:
    async def never(_: object) -> None:
        await asyncio.Event().wait()

    cluster = await build(stack, model, redis_url)
    await cluster.add("p0", **({"before": never} if stage == "prefill" else {}))
    await cluster.add("d0", at_token=never)
    request = GenerateRequest(token_ids=TokenIds(ids=[3] * 10), stop=TEN)
    with capture_logs() as lines, pytest.raises(DeadlineError):
        async for _ in cluster.frontend.generate(request, "r", Deadline(0.5)):
            pass
    assert finished(lines)["outcome"] == "DEADLINE_EXCEEDED"
    assert value(cluster, "deadline_misses_total", stage=stage) == 1


async def test_caller_api_and_guide_are_told(cluster: Cluster) -> None:
    request = GenerateRequest(token_ids=TokenIds(ids=[3] * 10), stop=TEN, guide=Guide(regex=SECRET_TEXT))
    with capture_logs() as lines:
        events = cluster.frontend.generate(request, "r", Deadline(20.0), Caller("team-a"), api="http")
        async for _ in events:
            pass
    line = finished(lines)
    assert (line["caller"], line["api"], line["guide"]) == ("team-a", "http", "regex")
    assert SECRET_TEXT not in str(lines)
    assert value(cluster, "requests_total", caller="team-a", reason="OK") == 1
    assert value(cluster, "caller_tokens_total", caller="team-a", kind="prompt") == 10
