"""The two clients, against a small server in this process. What holds for one holds for the other."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import trustme

from inference_server import FINISHED, STARTED, WHOLE, FakeInference, delta, serving
from zipserve.client import (
    AsyncClient,
    AsyncStream,
    Client,
    Delta,
    Finished,
    Message,
    Retry,
    Started,
    Stream,
    Tls,
    ToolCall,
    guides,
)
from zipserve.client.retry import Attempts
from zipserve.common.errors import (
    DeadlineError,
    DrainingError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnauthenticatedError,
    WorkerLostError,
    ZipserveError,
)
from zipserve.v1.inference_service_pb2 import GenerateResponse
from zipserve.v1.sampling_pb2 import GuideChoices

QUICK = Retry(attempts_max=3, backoff_s=0.001)


@dataclass
class Caller:
    """Uses one of the clients, a new one for each call."""

    kind: str

    def events(self, address: str, *arguments: Any, client: dict[str, Any] | None = None, **parameters: Any) -> Any:
        """All events of an answer."""
        if self.kind == "sync":
            with Client(address, **client or {}) as connected:
                return list(connected.generate(*arguments, **parameters))

        async def run() -> list[Any]:
            async with AsyncClient(address, **client or {}) as connected:
                return [event async for event in connected.generate(*arguments, **parameters)]

        return asyncio.run(run())

    def call(
        self, method: str, address: str, *arguments: Any, client: dict[str, Any] | None = None, **more: Any
    ) -> Any:
        """What a method returns."""
        if self.kind == "sync":
            with Client(address, **client or {}) as connected:
                return getattr(connected, method)(*arguments, **more)

        async def run() -> Any:
            async with AsyncClient(address, **client or {}) as connected:
                return await getattr(connected, method)(*arguments, **more)

        return asyncio.run(run())

    def first_events(self, address: str, count: int, ended: Callable[[], None]) -> list[Any]:
        """The first events of an answer that is then closed; `ended` is called before the client is."""
        if self.kind == "sync":
            with Client(address) as connected:
                with connected.generate("x") as stream:
                    events = [next(stream) for _ in range(count)]
                assert list(stream) == []
                ended()
                return events

        async def run() -> list[Any]:
            async with AsyncClient(address) as connected:
                async with connected.generate("x") as stream:
                    events = [await anext(stream) for _ in range(count)]
                assert [event async for event in stream] == []
                await asyncio.to_thread(ended)
                return events

        return asyncio.run(run())


@pytest.fixture(params=["sync", "async"])
def caller(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)


@pytest.fixture
def fake() -> FakeInference:
    return FakeInference()


@pytest.fixture
def address(fake: FakeInference) -> Iterator[str]:
    with serving(fake) as address:
        yield address


def test_events_come_typed_and_in_order(fake: FakeInference, address: str, caller: Caller) -> None:
    assert [type(event) for event in caller.events(address, "once upon")] == [Started, Delta, Delta, Finished]
    request = fake.requests[0]
    assert request.WhichOneof("prompt") == "text"
    assert request.text == "once upon"
    sampling, stop = request.sampling, request.stop
    assert not any(sampling.HasField(name) for name in ("temperature", "top_k", "top_p", "seed"))
    assert not stop.HasField("max_tokens")
    (timeout_s,) = fake.timeouts_s
    assert timeout_s is None or timeout_s > 1e9


def test_every_parameter_reaches_the_server(fake: FakeInference, address: str, caller: Caller) -> None:
    call = ToolCall("c-1", "add", '{"a": 1}')
    messages = [
        Message("user", "hi", name="Ann"),
        Message("assistant", "", tool_calls=[call]),
        Message("tool", "2", tool_call_id="c-1"),
    ]
    caller.events(
        address, messages, model="m", n=1, temperature=0.0, top_k=0, seed=2**63, max_tokens=9, stop=["\n"],
        priority=-2, cache_salt="tenant", guide=guides.choices(["a", "b"]), tools=[{"type": "function"}],
        template_arguments={"enable_thinking": False}, continue_final_message=True, timeout_s=20.0, request_id="mine",
    )  # fmt: skip
    request = fake.requests[0]
    assert [(m.role, m.content, m.name, m.tool_call_id) for m in request.chat.messages] == [
        ("user", "hi", "Ann", ""),
        ("assistant", "", "", ""),
        ("tool", "2", "", "c-1"),
    ]
    (told,) = request.chat.messages[1].tool_calls
    assert (told.id, told.name, told.arguments) == ("c-1", "add", '{"a": 1}')
    assert list(request.chat.tools) == ['{"type": "function"}']
    assert dict(request.chat.template_arguments) == {"enable_thinking": "false"}
    assert request.chat.continue_final_message
    assert request.sampling.HasField("temperature")
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.0, 0, 2**63)
    assert (request.model, request.n, request.stop.max_tokens, list(request.stop.stop)) == ("m", 1, 9, ["\n"])
    assert (request.priority, request.cache_salt) == (-2, "tenant")
    assert request.guide.choices == GuideChoices(texts=["a", "b"])
    assert fake.metadata[0]["x-request-id"] == "mine"
    assert "authorization" not in fake.metadata[0]
    timeout_s = fake.timeouts_s[0]
    assert timeout_s is not None
    assert 10 < timeout_s < 21


def test_token_ids(fake: FakeInference, address: str, caller: Caller) -> None:
    caller.events(address, [5, 6])
    assert list(fake.requests[0].token_ids.ids) == [5, 6]
    assert fake.requests[0].WhichOneof("prompt") == "token_ids"


def test_an_unknown_parameter_is_refused(address: str, caller: Caller) -> None:
    with pytest.raises(TypeError, match="unknown parameters: heat"):
        caller.events(address, "x", heat=1)


def test_calls_with_one_answer(fake: FakeInference, address: str, caller: Caller) -> None:
    answer = caller.call("complete", address, [Message("user", "x")], max_tokens=3, request_id="mine")
    assert answer.choices[0].text == "Paris."
    assert caller.call("tokenize", address, "x", model="m") == [1, 2, 3]
    assert caller.call("tokenize", address, [Message("user", "x")], tools=[{"a": 1}]) == [1, 2, 3]
    assert caller.call("detokenize", address, [1, 2, 3]) == "Paris."
    assert [model.id for model in caller.call("models", address)] == ["m"]
    assert caller.call("model", address, "m").id == "m"
    whole, text, chat, ids, _, model = fake.asked
    assert (whole.request.chat.messages[0].content, whole.request.stop.max_tokens) == ("x", 3)
    assert (text.text, text.model) == ("x", "m")
    assert list(chat.chat.tools) == ['{"a": 1}']
    assert list(ids.token_ids) == [1, 2, 3]
    assert model.model == "m"
    assert fake.metadata[0]["x-request-id"] == "mine"


def test_a_typed_error_arrives_after_what_came_before(fake: FakeInference, address: str, caller: Caller) -> None:
    fake.fail(OverloadedError("full: 4 of 4 requests", retry_after_s=2.5), WHOLE[:2])
    with pytest.raises(OverloadedError, match="full: 4 of 4 requests") as raised:
        caller.events(address, "x", client={"retry": QUICK})
    assert raised.value.retry_after_s == 2.5
    assert len(fake.requests) == 1, "what the caller has seen is not begun again"


def test_typed_errors_of_calls_with_one_answer(fake: FakeInference, address: str, caller: Caller) -> None:
    fake.failures = [InvalidRequestError("n is 17", field="n"), UnauthenticatedError("no such key")]
    with pytest.raises(InvalidRequestError) as raised:
        caller.call("complete", address, "x", n=17)
    assert raised.value.field == "n"
    with pytest.raises(UnauthenticatedError):
        caller.call("models", address)


def test_closing_the_stream_cancels_the_call(fake: FakeInference, address: str, caller: Caller) -> None:
    fake.hang(STARTED, delta(0, [1], "a"))

    def ended() -> None:
        assert fake.cancelled.wait(10)

    assert len(caller.first_events(address, 2, ended)) == 2


def test_a_stream_can_be_closed_by_another_thread(fake: FakeInference, address: str) -> None:
    fake.hang(STARTED)
    with Client(address) as client:
        stream = client.generate("x")
        next(stream)
        closing = threading.Thread(target=stream.close)
        closing.start()
        assert list(stream) == []
        closing.join()


async def test_a_cancelled_task_cancels_the_call(fake: FakeInference, address: str) -> None:
    fake.hang(STARTED)
    async with AsyncClient(address) as client:

        async def read() -> None:
            async with client.generate("x") as stream:
                async for _ in stream:
                    started.set()

        started = asyncio.Event()
        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.cancelled.wait, 10)


def test_the_deadline_ends_the_call(fake: FakeInference, address: str, caller: Caller) -> None:
    fake.hang(STARTED)
    with pytest.raises(DeadlineError):
        caller.events(address, "x", timeout_s=0.05)
    assert fake.cancelled.wait(10)


def test_an_unreachable_server_is_told(unused_tcp_port: int, caller: Caller) -> None:
    with pytest.raises(WorkerLostError):
        caller.events(f"127.0.0.1:{unused_tcp_port}", "x")
    with pytest.raises(WorkerLostError):
        caller.call("models", f"127.0.0.1:{unused_tcp_port}")


@pytest.mark.parametrize("error", [OverloadedError("full", retry_after_s=0.002), DrainingError("going away")])
def test_what_may_pass_is_tried_again(fake: FakeInference, address: str, caller: Caller, error: ZipserveError) -> None:
    fake.failures = [error] * 2
    events = caller.events(address, "x", client={"retry": QUICK}, timeout_s=10.0)
    assert [type(event) for event in events] == [Started, Delta, Delta, Finished]
    assert len(fake.requests) == 3
    fake.failures = [error] * 2
    assert caller.call("complete", address, "x", client={"retry": QUICK}).choices[0].text == "Paris."
    assert len(fake.asked) == 3


def test_attempts_end(fake: FakeInference, address: str, caller: Caller) -> None:
    fake.failures = [DrainingError("going away")] * 3
    with pytest.raises(DrainingError):
        caller.events(address, "x", client={"retry": QUICK})
    assert (len(fake.requests), fake.failures) == (3, [])
    fake.failures = [DrainingError("going away")]
    with pytest.raises(DrainingError):
        caller.events(address, "x")
    fake.failures = [InvalidRequestError("never")]
    with pytest.raises(InvalidRequestError):
        caller.events(address, "x", client={"retry": QUICK})
    assert len(fake.requests) == 5


def test_no_attempt_after_the_deadline(fake: FakeInference, address: str, caller: Caller) -> None:
    """A server that says to come back later than there is time is not waited for."""
    fake.failures = [OverloadedError("full", retry_after_s=30.0)]
    with pytest.raises(OverloadedError):
        caller.events(address, "x", client={"retry": QUICK}, timeout_s=20.0)
    assert len(fake.requests) == 1


def test_pauses() -> None:
    now_s = 0.0
    retry = Retry(attempts_max=5, backoff_s=1.0, backoff_max_s=3.0)
    attempts = Attempts(retry, 20.0, now=lambda: now_s, draw=lambda: 0.5)
    assert attempts.remaining_s() == 20.0
    assert attempts.pause_s(DrainingError("")) == 1.5
    assert attempts.pause_s(OverloadedError("", retry_after_s=7)) == 8.0
    now_s = 12.0
    assert attempts.remaining_s() == 8.0
    assert attempts.pause_s(WorkerLostError("")) == 4.5
    now_s = 16.0
    with pytest.raises(WorkerLostError):
        attempts.pause_s(WorkerLostError(""))
    assert Attempts(retry, None).remaining_s() is None


def test_a_key_is_sent_with_every_call(fake: FakeInference, address: str, caller: Caller) -> None:
    caller.events(address, "x", client={"api_key": "zs-secret"})
    caller.call("models", address, client={"api_key": "zs-secret"})
    assert [metadata["authorization"] for metadata in fake.metadata] == ["Bearer zs-secret"] * 2


def test_mutual_tls(fake: FakeInference, caller: Caller, tmp_path: Any) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server, own = authority.issue_cert("127.0.0.1"), authority.issue_cert("client@example.org")
    own.cert_chain_pems[0].write_to_path(tmp_path / "own.pem")
    own.private_key_pem.write_to_path(tmp_path / "own.key")
    credentials = grpc.ssl_server_credentials(
        [(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())],
        authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    tls = Tls.read(tmp_path / "ca.pem", tmp_path / "own.pem", tmp_path / "own.key")
    with serving(fake, credentials) as address:
        assert len(caller.events(address, "x", client={"tls": tls})) == 4
        assert caller.call("model", address, client={"tls": tls}).id == "m"
        for refused in (None, Tls(), Tls(tls.roots)):
            with pytest.raises(WorkerLostError):
                caller.call("models", address, client={"tls": refused})


@pytest.mark.parametrize(
    "responses",
    [
        [STARTED, delta(0, [1], "a"), delta(2, [3], "c"), FINISHED],  # a token is lost
        [STARTED, delta(0, [1], "a"), delta(0, [1], "a"), FINISHED],  # a token is repeated
        [STARTED, delta(0, [1], "a")],  # the end is lost
        [delta(0, [1], "a"), FINISHED],  # the start is lost
        [STARTED, STARTED, FINISHED],
        [STARTED, FINISHED, FINISHED],
        [],
    ],
)
def test_a_broken_stream_is_refused(
    fake: FakeInference, address: str, caller: Caller, responses: list[GenerateResponse]
) -> None:
    fake.answer(responses)
    with pytest.raises(InternalError):
        caller.events(address, "x")


def test_a_choice_that_was_not_asked_for_is_refused(fake: FakeInference, address: str, caller: Caller) -> None:
    fake.answer([STARTED, GenerateResponse(delta=Delta(choice=1)), FINISHED])
    with pytest.raises(InternalError, match="choice 1, which has finished or was not asked for"):
        caller.events(address, "x")


def test_an_event_of_a_later_version_is_skipped(fake: FakeInference, address: str, caller: Caller) -> None:
    fake.answer([STARTED, GenerateResponse(), FINISHED])
    assert [type(event) for event in caller.events(address, "x")] == [Started, Finished]


def test_both_clients_offer_the_same() -> None:
    def surface(kind: type) -> set[str]:
        return {name.replace("__a", "__") for name in vars(kind) if not name.startswith("_") or name.startswith("__a")}

    assert surface(Client) == surface(AsyncClient) - {"__enter__", "__exit__"}
    assert {name for name in vars(Stream) if name[0] != "_"} == {name for name in vars(AsyncStream) if name[0] != "_"}


def test_guides() -> None:
    assert guides.json_schema({"type": "string"}).json_schema == '{"type": "string"}'
    assert guides.json_schema("{}").json_schema == "{}"
    assert guides.regex("a+").regex == "a+"
    assert guides.grammar("start: /a/").grammar == "start: /a/"
    assert guides.JSON_OBJECT.json_object


_BASE_ONLY = """
import sys

class BaseOnly:
    base = {"google", "grpc", "grpc_status", "typing_extensions", "zipserve", *sys.stdlib_module_names}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.base:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, BaseOnly())
import zipserve.client
print(zipserve.client.Client("127.0.0.1:1").__class__.__name__)
"""


def test_the_client_needs_the_base_install_only() -> None:
    command = [sys.executable, "-P", "-c", _BASE_ONLY]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == "Client\n", result.stderr
