"""What the chart draws is taken by those who use it: the router's keys, Redis' users, both ends of a TLS connection."""

from pathlib import Path
from typing import Any

import grpc
import pytest
import redis

from chart import Rendered, example, render
from chart_secrets import bundled_redis, secret
from inprocess import SECRET
from polling import until
from zipserve.cli import parser
from zipserve.common.api_keys import digest
from zipserve.common.directory import DirectoryView, DirectoryWriter
from zipserve.common.kv.holders import Holders
from zipserve.common.registry import RegistryView, RegistryWriter
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.door import ClusterTokens
from zipserve.common.rpc.tls import Certificates, TlsFiles
from zipserve.common.settings import ServiceSettings
from zipserve.router.access import keys
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole


@pytest.fixture(scope="module")
def made() -> Rendered:
    return render({"publicTls": {"mode": "generated", "names": ["llm.example.com"]}})


def test_the_router_knows_the_key(made: Rendered) -> None:
    drawn = secret(made, "api-key")
    (known,) = keys.parse(drawn["keys.jsonl"]).values()
    assert known.sha256 == digest(drawn["key"])
    assert len(drawn["key"]) >= 40
    assert drawn["key"] != secret(render(), "api-key")["key"]


def test_the_cluster_secret_is_long_enough(made: Rendered) -> None:
    assert len(ServiceSettings.model_validate({"secret": secret(made, "cluster")["secret"]}).secret_bytes) == 48


def write(data: dict[str, str], folder: Path) -> TlsFiles:
    for name, text in data.items():
        (folder / name).write_text(text)
    return TlsFiles(str(folder / "tls.crt"), str(folder / "tls.key"), str(folder / "ca.crt"))


@pytest.mark.parametrize("name", ["tls", "public-tls"])
async def test_certificates_prove_both_sides(made: Rendered, name: str, tmp_path: Path) -> None:
    certificates = Certificates(write(secret(made, name), tmp_path))
    (router,) = made.workloads("router")
    names = {
        "tls": [made.environment(router)["ZIPSERVE_ROUTER_TLS_NAME"]],
        "public-tls": ["zs-zipserve-router", "zs-zipserve-router.ml.svc", "llm.example.com"],
    }
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", certificates.server_credentials())
    await server.start()
    try:
        for expected in names[name]:
            async with ChannelPool(1 << 20, ClusterTokens(SECRET.encode()), certificates, expected) as channels:
                call: Any = channels.get(f"127.0.0.1:{port}").unary_unary("/a/b")
                with pytest.raises(grpc.aio.AioRpcError) as answer:
                    await call(b"", timeout=10.0)
                assert answer.value.code() == grpc.StatusCode.UNIMPLEMENTED  # so the server was reached
    finally:
        await server.stop(0)


async def test_the_bundled_redis_lets_in_the_services_and_nobody_else(made: Rendered, tmp_path: Path) -> None:
    (router,) = made.workloads("router")
    url = made.environment(router)["ZIPSERVE_ROUTER_REDIS_URL"]
    assert url == "redis://zipserve:secret-zs-zipserve-redis-password@zs-zipserve-redis:6379/0"
    url = url.replace("secret-zs-zipserve-redis-password", secret(made, "redis")["password"])
    async with bundled_redis(made, tmp_path) as address:
        url = url.replace("zs-zipserve-redis:6379", address)
        await _serves(url)
        with redis.Redis.from_url(f"redis://{address}") as anybody, pytest.raises(redis.AuthenticationError):
            anybody.ping()
        with redis.Redis.from_url(url) as ours:
            for forbidden in (("GET", "others"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    ours.execute_command(*forbidden)


async def _serves(url: str) -> None:
    """Registry and directory work there."""
    values = {"redis_url": url, "secret": SECRET, "cluster": "ml.zs", "worker_id": "d0", "heartbeat_s": 0.05}
    settings = ServiceSettings.model_validate(values)
    role = WorkerRole.WORKER_ROLE_DECODE
    capabilities = Capabilities(worker_id="d0", incarnation=7, role=role, address="127.0.0.1:1")
    first, second = b"a" * 32, b"b" * 32
    seen: list[bytes] = []
    async with (
        RegistryWriter(settings, capabilities, Load),
        RegistryView(settings) as view,
        DirectoryWriter(settings, 7, lambda: [(first, b"")]) as writer,
        DirectoryView(settings, view, Holders(), lambda _, names: seen.extend(names)),
    ):
        writer.added(first, [second])
        await until(lambda: set(seen) >= {first, second}, "blocks are known")


@pytest.mark.parametrize("name", ["minimal", "closed", "cert-manager", "open"])
def test_the_test_pod_asks_as_the_command_line_takes_it(name: str) -> None:
    made = render(example(name))
    pod = made.one("Pod", "test")["spec"]
    (container,) = pod["containers"]
    options = parser.build().parse_args(container["args"])
    assert (options.command, options.address, options.max_tokens) == ("generate", "zs-zipserve-router:7000", 8)
    assert options.timeout < pod["activeDeadlineSeconds"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    roots = {each["name"]: each["value"] for each in container.get("env", [])}.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")
    files = [options.api_key_file, roots, options.tls_certificate, options.tls_key]
    assert [path for path in files if path and str(Path(path).parent) not in mounts] == []
    assert options.tls == bool(roots)
    assert [options.tls_name, *(bool(path) for path in files)] == {
        "minimal": ["", True, False, False, False],
        "closed": ["llm.example.com", True, True, True, True],
        "cert-manager": ["llm.example.com", True, True, False, False],
        "open": ["", False, False, False, False],
    }[name]
