"""Real processes: each sends its spans by itself, serves its metrics, and `zipserve top` finds all of them."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from otlp_collector import collecting
from polling import until
from processes import Processes
from streams import Stub, collect, request
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub

NAMES = ("kvstore-0", "prefill-0", "decode-0", "router")


@pytest.mark.slow
async def test_a_cluster_is_watched(
    redis_url: str,
    cluster: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        async with (
            Processes(redis_url, tiny_model, tmp_path, cluster=cluster) as processes,
            ChannelPool(1 << 22) as channels,
        ):
            await processes.start(*NAMES)
            stub: Stub = InferenceServiceStub(channels.get(processes.router))
            answer = await collect(stub, request([3 + i % 200 for i in range(300)], 20))
            assert len(answer.token_ids) == 20

            def has_beaten() -> bool:
                records = {record.worker_id: record for record in processes.view.records()}
                return set(records) == set(NAMES) and all(r.capabilities.metrics_address for r in records.values())

            await until(has_beaten, "the registry shows everybody's metrics")
            shown = await _top(redis_url, cluster)
            rows = {row["name"]: row for row in shown["rows"]}
            assert set(rows) == set(NAMES)
            assert {row["state"] for row in rows.values()} == {"ready"}
            assert sum(rows["decode-0"][f"blocks_{state}"] for state in ("used", "idle", "free")) == 256
            assert shown["latency_s"]["ttft"]["p50"] > 0
            assert shown["latency_s"]["itl"]["p99"] > 0
            assert "prefill>decode" in shown["flow_bytes_per_s"]
            log = processes.log("router")
            for name in reversed(NAMES):
                processes.signal(name, 15)
                assert await processes.wait(name) == 0
        (line,) = [json.loads(line) for line in log.splitlines() if '"request.finished"' in line]
        assert (line["service"], line["outcome"], line["completion_tokens"]) == ("router", "OK", 20)
        for name, event in (("prefill-0", "prompt.finished"), ("decode-0", "sequence.finished")):
            (worked,) = [json.loads(text) for text in processes.log(name).splitlines() if f'"{event}"' in text]
            assert (worked["outcome"], worked["request_id"]) == ("OK", line["request_id"])
    ours = [span for span in collector.spans if span.trace_id == line["trace_id"]]
    assert {span.resource["service.name"] for span in ours} == {
        "zipserve-router",
        "zipserve-prefill",
        "zipserve-decode",
    }
    assert {span.resource["service.instance.id"] for span in ours} == {"router", "prefill-0", "decode-0"}
    by_name = {span.name: span for span in ours}
    assert by_name["zipserve.v1.PrefillService/Prefill"].parent_id == by_name["prefill"].span_id
    assert by_name["prefill"].resource["service.namespace"] == cluster


async def _top(redis_url: str, cluster: str) -> Any:
    where = ("--redis", redis_url, "--cluster", cluster)
    command = (sys.executable, "-P", "-m", "zipserve.cli", "top", *where, "--once", "--json", "--interval", "0.2")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(output)
