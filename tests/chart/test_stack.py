"""Real processes with all that the chart renders, and the question of `helm test` to them."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
import trustme

from chart import Manifest, Rendered, render
from chart_queries import expressions
from chart_secrets import bundled_redis, free_port, secret
from polling import until

SERVICES = ("prefill", "decode", "kvstore", "router")
VALUES = {
    "model": {"name": "/models/tiny", "volume": {"emptyDir": {}}},
    "publicTls": {"mode": "existingSecret", "existingSecret": "ours", "names": ["llm.example.com"], "clientCa": True},
    "prefill": {"settings": {"kv_blocks": 16, "kv_tails": 8, "threads": 1}},
    "decode": {"settings": {"kv_blocks": 16, "kv_tails": 8, "threads": 1}},
    "kvstore": {"settings": {"memory_bytes": 1 << 20, "sinks_min": 1}, "disk": {"size": "16Mi"}},
}


class Node:
    """Runs pods as processes of this machine: their volumes are folders, and each port is a free one."""

    def __init__(self, made: Rendered, folder: Path, places: dict[str, str]) -> None:
        self._made, self._folder = made, folder
        self._places = {"0.0.0.0:": "127.0.0.1:", "10.1.2.3": "127.0.0.1", ":7000": ":0", ":8000": ":0", **places}

    def here(self, text: str, pod: Manifest) -> str:
        """What a pod is told, with the paths and addresses of this machine."""
        for original, place in {**self._mounts(pod), **self._places}.items():
            text = text.replace(original, place)
        return text

    def _mounts(self, pod: Manifest) -> dict[str, str]:
        secrets = {each["name"]: each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each}
        mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        for name in secrets.values():
            (self._folder / name).mkdir(exist_ok=True)
            if name.startswith("zs-"):
                for file, text in secret(self._made, name).items():
                    (self._folder / name / file).write_text(text)
        return {mounts[volume]: str(self._folder / name) for volume, name in secrets.items()}

    @asynccontextmanager
    async def running(self, service: str, metrics_port: int) -> AsyncIterator[str]:
        """Starts a service, waits until it is ready, and gives its address; it has to drain at the end."""
        (workload,) = self._made.workloads(service)
        pod = workload["spec"]["template"]["spec"]
        told = {name: self.here(text, pod) for name, text in self._made.environment(workload).items()}
        told[f"ZIPSERVE_{service.upper()}_METRICS_PORT"] = str(metrics_port)
        log = self._folder / f"{service}.log"
        with log.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", f"zipserve.{service}", stderr=sink, env={**os.environ, **told}
            )  # fmt: skip
        try:
            await until(lambda: "service.ready" in log.read_text() or process.returncode is not None, service, 90.0)
            assert process.returncode is None, log.read_text()
            lines = [json.loads(line) for line in log.read_text().splitlines() if '"service.ready"' in line]
            yield lines[0]["address"]
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 30.0) == 0
        finally:
            with suppress(ProcessLookupError):
                process.kill()

    async def test(self, address: str) -> tuple[int, str]:
        """Runs the pod of `helm test` against the router; returns its exit status and what it said."""
        pod = self._made.one("Pod", "test")["spec"]
        (container,) = pod["containers"]
        arguments = [self.here(each.replace("zs-zipserve-router:7000", address), pod) for each in container["args"]]
        told = {each["name"]: self.here(each["value"], pod) for each in container["env"]}
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "zipserve.cli", *arguments, stdout=pipe, stderr=pipe, env={**os.environ, **told}
        )
        _, said = await asyncio.wait_for(process.communicate(), 60.0)
        return process.returncode or 0, said.decode()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_what_the_chart_renders_answers(tmp_path: Path, tiny_model: Path) -> None:
    made = render(VALUES)
    write_certificate(tmp_path / "ours", "llm.example.com")
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(bundled_redis(made, tmp_path))
        password = secret(made, "redis")["password"]
        places = {
            "secret-zs-zipserve-redis-password": password,
            "zs-zipserve-redis:6379": redis,
            "secret-zs-zipserve-cluster-secret": secret(made, "cluster")["secret"],
            "/models/tiny": str(tiny_model),
            "/var/lib/zipserve": str(tmp_path / "disk"),
        }
        node = Node(made, tmp_path, places)
        address, metrics_ports = "", {service: free_port() for service in SERVICES}
        for service, port in metrics_ports.items():
            address = await stack.enter_async_context(node.running(service, port))
        status, told = await node.test(address)
        assert status == 0, told
        assert "KV over NIXL" in told
        families = await asyncio.gather(*(asyncio.to_thread(scraped, port) for port in metrics_ports.values()))
    asked = {name for query in expressions() for name in re.findall(r"\bzipserve_\w+", query)}
    assert len(asked) > 20
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in asked} <= set.union(*families)


def write_certificate(folder: Path, name: str) -> None:
    """The secret of the example's publicTls: its certificate is the router's and the tester's."""
    authority = trustme.CA()
    certificate = authority.issue_cert(name)
    folder.mkdir()
    authority.cert_pem.write_to_path(folder / "ca.crt")
    certificate.private_key_pem.write_to_path(folder / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(folder / "tls.crt")


def scraped(port: int) -> set[str]:
    """Names of the metrics that a service tells; of a counter as it is asked for."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
        return set(re.findall(r"^# TYPE (zipserve_\w+) ", answer.read().decode(), re.MULTILINE))
