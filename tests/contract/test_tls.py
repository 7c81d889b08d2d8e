"""TLS between services, and to clients: who has the wrong papers, or none, is refused; papers change under load."""

import asyncio
import socket
import ssl
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from structlog.testing import capture_logs

from polling import until
from router_cluster import Cluster, answer, build
from zipserve.common.errors import InvalidRequestError
from zipserve.common.models import ModelFiles
from zipserve.common.rpc import tls
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.door import ClusterTokens
from zipserve.common.rpc.tls import Certificates, TlsFiles
from zipserve.router.config import RouterSettings
from zipserve.v1.inference_service_pb2 import ListModelsRequest
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.sampling_pb2 import StopConditions
from zipserve.v1.worker_service_pb2 import GetCapabilitiesRequest
from zipserve.v1.worker_service_pb2_grpc import WorkerServiceStub

STOP = StopConditions(max_tokens=20)


def issue(authority: trustme.CA, folder: Path, name: str = "127.0.0.1", trusts: trustme.CA | None = None) -> TlsFiles:
    """Writes a certificate, its key and the authority that its owner trusts, or exchanges them."""
    leaf = authority.issue_cert(name)
    files = TlsFiles(str(folder / "cert.pem"), str(folder / "key.pem"), str(folder / "ca.pem"))
    Path(files.cert).write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    Path(files.key).write_bytes(leaf.private_key_pem.bytes())
    Path(files.ca).write_bytes((trusts or authority).cert_pem.bytes())
    return files


def within(files: TlsFiles) -> dict[str, str]:
    return {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}


def public(files: TlsFiles, *, asks_clients: bool = False) -> dict[str, str]:
    values = {"public_tls_cert": files.cert, "public_tls_key": files.key}
    return {**values, "public_tls_client_ca": files.ca} if asks_clients else values


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_LOOK_S", 0.0)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def cluster(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str, authority: trustme.CA, tmp_path: Path
) -> Cluster:
    """A router and its workers, with mutual TLS between them."""
    cluster = await build(stack, model, redis_url, **within(issue(authority, tmp_path)))
    await cluster.add("p0")
    await cluster.add("d0")
    return cluster


async def reaches(cluster: Cluster, address: str, certificates: Certificates | None, name: str = "") -> bool:
    tokens = ClusterTokens(cluster.settings.secret_bytes)
    async with ChannelPool(1 << 20, tokens, certificates, name) as channels:
        stub = WorkerServiceStub(channels.get(address))
        try:
            await stub.GetCapabilities(GetCapabilitiesRequest(), timeout=5.0)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True


async def test_who_belongs_to_the_cluster(cluster: Cluster, authority: trustme.CA, tmp_path: Path) -> None:
    assert len((await answer(cluster.generate(stop=STOP))).token_ids) == 20
    address = cluster.workers.prefills()[0].address
    folders = [tmp_path / str(i) for i in range(3)]
    for folder in folders:
        folder.mkdir()
    good = Certificates(issue(authority, folders[0]))
    assert await reaches(cluster, address, good)
    assert not await reaches(cluster, address, None), "plaintext"
    assert not await reaches(cluster, address, good, "another.name"), "the name is checked"
    assert not await reaches(cluster, address, Certificates(issue(trustme.CA(), folders[1]))), "another authority"
    foreign = issue(trustme.CA(), folders[2], trusts=authority)
    assert not await reaches(cluster, address, Certificates(foreign)), "it trusts us, we do not trust it"


async def test_one_name_for_all_services(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str, authority: trustme.CA, tmp_path: Path
) -> None:
    files = within(issue(authority, tmp_path, "zipserve.internal"))
    cluster = await build(stack, model, redis_url, tls_name="zipserve.internal", **files)
    await cluster.add("p0")
    await cluster.add("d0")
    assert len((await answer(cluster.generate(stop=STOP))).token_ids) == 20


async def test_certificates_change_under_load(cluster: Cluster, authority: trustme.CA, tmp_path: Path) -> None:
    served, stop = 0, asyncio.Event()

    async def load() -> None:
        nonlocal served
        while not stop.is_set():
            assert len((await answer(cluster.generate(stop=STOP))).token_ids) == 20
            served += 1

    pool = cluster.workers._channels
    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(load())
        for generation in range(1, 4):
            issue(authority, tmp_path)
            await until(lambda least=generation: pool._generation >= least, "new certificates")  # type: ignore[misc]
            for _ in range(5):
                await answer(cluster.generate(stop=STOP))
        stop.set()


def test_half_written_files_are_not_taken(authority: trustme.CA, tmp_path: Path) -> None:
    files = issue(authority, tmp_path)
    certificates = Certificates(files)
    other = authority.issue_cert("127.0.0.1")
    Path(files.key).write_bytes(other.private_key_pem.bytes())
    with capture_logs() as logs:
        certificates.refresh()
    assert [line["event"] for line in logs] == ["tls.unreadable"]
    assert certificates.generation == 0
    Path(files.cert).write_bytes(other.cert_chain_pems[0].bytes())
    certificates.refresh()
    assert certificates.generation == 1


def test_wrong_files_keep_a_service_from_starting(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be used: "):
        Certificates(TlsFiles(str(tmp_path / "none"), str(tmp_path / "none")))


@pytest.mark.parametrize(
    "values",
    [{"tls_cert": "a"}, {"tls_cert": "a", "tls_key": "b"}, {"public_tls_cert": "a"}, {"public_tls_client_ca": "a"}],
)
def test_settings_that_are_not_whole(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"belong together|needs public_tls_cert"):
        RouterSettings.model_validate({"secret": "x" * 16, **values})


async def models(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    channel = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
    async with channel:
        stub: Any = InferenceServiceStub(channel)
        try:
            return bool((await stub.ListModels(ListModelsRequest(), timeout=5.0)).models)
        except grpc.aio.AioRpcError:
            return False


async def test_clients_over_tls(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str, authority: trustme.CA, tmp_path: Path
) -> None:
    files = issue(authority, tmp_path)
    cluster = await build(stack, model, redis_url, **public(files))
    trusting = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    assert await models(cluster.address, trusting)
    assert not await models(cluster.address, None)
    assert not await models(cluster.address, grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes()))
    issue(other := trustme.CA(), tmp_path)
    assert await models(cluster.address, grpc.ssl_channel_credentials(other.cert_pem.bytes())), "new connections see it"
    assert not await models(cluster.address, trusting)


async def test_clients_with_certificates(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str, authority: trustme.CA, tmp_path: Path
) -> None:
    files = issue(authority, tmp_path)
    cluster = await build(stack, model, redis_url, **public(files, asks_clients=True))
    assert not await models(cluster.address, grpc.ssl_channel_credentials(authority.cert_pem.bytes()))
    assert await models(cluster.address, Certificates(files).channel_credentials())


async def test_a_context_for_http_follows_the_files(authority: trustme.CA, tmp_path: Path) -> None:
    files = issue(authority, tmp_path)
    certificates = Certificates(TlsFiles(files.cert, files.key))

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=certificates.server_context())
    port = server.sockets[0].getsockname()[1]

    def trusted(by: trustme.CA) -> bool:
        context = ssl.create_default_context(cadata=by.cert_pem.bytes().decode())
        try:
            with (
                socket.create_connection(("127.0.0.1", port)) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1"),
            ):
                return True
        except ssl.SSLError:
            return False

    async with server:
        assert await asyncio.to_thread(trusted, authority)
        other = trustme.CA()
        issue(other, tmp_path)
        assert await asyncio.to_thread(trusted, other)
        assert not await asyncio.to_thread(trusted, authority)
