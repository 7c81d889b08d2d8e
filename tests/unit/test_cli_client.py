"""The client and the commands on top of it, against a small server in this process."""

import io
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_status import rpc_status

from zipserve.cli.__main__ import main
from zipserve.cli.answer import Answer
from zipserve.cli.client import Client, Message, Stream
from zipserve.common.errors import DeadlineError, InternalError, OverloadedError, WorkerLostError, ZipserveError
from zipserve.common.rpc.status import to_status
from zipserve.v1.inference_service_pb2 import (
    Delta,
    Finished,
    GenerateRequest,
    GenerateResponse,
    KvTransfer,
    ListModelsRequest,
    ListModelsResponse,
    Model,
    PromptLogprobs,
    Started,
    Timings,
    Usage,
)
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from zipserve.v1.sampling_pb2 import FinishReason, SamplingParams, StopConditions, TokenLogprobs

STARTED = GenerateResponse(started=Started(request_id="r-1", model="m", prompt_tokens=5, seed=7))
FINISHED = GenerateResponse(
    finished=Finished(
        reason=FinishReason.FINISH_REASON_STOP,
        usage=Usage(prompt_tokens=5, completion_tokens=3),
        timings=Timings(prefill=Duration(nanos=20_000_000), transfer=Duration(nanos=1_500_000)),
        kv_transfer=KvTransfer(bytes=3 << 20, blocks=2, tokens=300),
    )
)


def _delta(index: int, token_ids: Sequence[int], text: str) -> GenerateResponse:
    return GenerateResponse(delta=Delta(index=index, token_ids=token_ids, text=text))


WHOLE = [STARTED, _delta(0, [1], "Par"), _delta(1, [2, 3], "is."), FINISHED]
Script = Callable[[GenerateRequest, Any], Iterator[GenerateResponse]]


class FakeInference(InferenceServiceServicer):
    """Answers as the test says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.script: Script
        self.answer(WHOLE)
        self.requests: list[GenerateRequest] = []
        self.cancelled = threading.Event()

    def Generate(self, request: GenerateRequest, context: Any) -> Iterator[GenerateResponse]:
        self.requests.append(request)
        yield from self.script(request, context)

    def ListModels(self, request: ListModelsRequest, context: Any) -> ListModelsResponse:
        return ListModelsResponse(models=[Model(id="m", context_tokens=10)])

    def answer(self, responses: Sequence[GenerateResponse]) -> None:
        self.script = lambda _request, _context: iter(responses)

    def fail(self, error: ZipserveError, first: Sequence[GenerateResponse] = ()) -> None:
        def script(request: GenerateRequest, context: Any) -> Iterator[GenerateResponse]:
            yield from first
            context.abort_with_status(rpc_status.to_status(to_status(error)))

        self.script = script

    def hang(self, *first: GenerateResponse) -> None:
        def script(request: GenerateRequest, context: Any) -> Iterator[GenerateResponse]:
            if not context.add_callback(self.cancelled.set):
                self.cancelled.set()
            yield from first
            self.cancelled.wait(10)

        self.script = script


@pytest.fixture
def fake() -> FakeInference:
    return FakeInference()


@pytest.fixture
def address(fake: FakeInference) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_InferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def _events(*responses: GenerateResponse) -> Stream:
    class Call(Iterator[GenerateResponse]):
        def __init__(self) -> None:
            self._left = iter(responses)

        def __next__(self) -> GenerateResponse:
            return next(self._left)

        def cancel(self) -> bool:
            return True

    return Stream(Call())


def test_events_come_typed_and_in_order(fake: FakeInference, address: str) -> None:
    with Client(address) as client:
        events = list(client.generate("once upon"))
        assert [model.id for model in client.models()] == ["m"]
    assert [type(event) for event in events] == [Started, Delta, Delta, Finished]
    request = fake.requests[0]
    assert request.WhichOneof("prompt") == "text"
    assert request.text == "once upon"
    sampling, stop = request.sampling, request.stop
    assert not any(sampling.HasField(name) for name in ("temperature", "top_k", "top_p", "seed"))
    assert not stop.HasField("max_tokens")


def test_parameters_and_conversations_reach_the_server(fake: FakeInference, address: str) -> None:
    with Client(address) as client:
        messages = [Message("system", "be brief"), Message("user", "hi")]
        parameters: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 0.5, "seed": 2**63}
        list(client.generate(messages, model="m", max_tokens=9, stop=["\n"], **parameters))
    request = fake.requests[0]
    assert [(message.role, message.content) for message in request.chat.messages] == [
        ("system", "be brief"),
        ("user", "hi"),
    ]
    sampling = request.sampling
    assert sampling.HasField("temperature")
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.0, 0, 0.5, 2**63)
    assert sampling.HasField("top_k")
    assert (request.model, request.stop.max_tokens, list(request.stop.stop)) == ("m", 9, ["\n"])


def test_a_typed_error_arrives_after_what_came_before(fake: FakeInference, address: str) -> None:
    fake.fail(OverloadedError("full: 4 of 4 requests", retry_after_s=2.5), WHOLE[:2])
    with Client(address) as client:
        stream = client.generate("x")
        assert isinstance(next(stream), Started)
        assert isinstance(next(stream), Delta)
        with pytest.raises(OverloadedError, match="full: 4 of 4 requests") as raised:
            next(stream)
    assert raised.value.retry_after_s == 2.5


def test_leaving_the_stream_cancels_the_call(fake: FakeInference, address: str) -> None:
    fake.hang(STARTED)
    with Client(address) as client:
        with client.generate("x") as stream:
            next(stream)
            assert not fake.cancelled.is_set()
        assert fake.cancelled.wait(10)


def test_the_deadline_ends_the_call(fake: FakeInference, address: str) -> None:
    fake.hang(STARTED)
    with Client(address) as client, pytest.raises(DeadlineError):
        list(client.generate("x", timeout_s=0.05))
    assert fake.cancelled.wait(10)


def test_an_unreachable_server_is_told(unused_tcp_port: int) -> None:
    with Client(f"127.0.0.1:{unused_tcp_port}") as client:
        with pytest.raises(WorkerLostError):
            list(client.generate("x"))
        with pytest.raises(WorkerLostError):
            client.models()


@pytest.mark.parametrize(
    "responses",
    [
        [STARTED, _delta(0, [1], "a"), _delta(2, [3], "c"), FINISHED],  # a token is lost
        [STARTED, _delta(0, [1], "a"), _delta(0, [1], "a"), FINISHED],  # a token is repeated
        [STARTED, _delta(0, [1], "a")],  # the end is lost
        [_delta(0, [1], "a"), FINISHED],  # the start is lost
        [STARTED, STARTED, FINISHED],
        [STARTED, FINISHED, FINISHED],
        [],
    ],
)
def test_a_broken_stream_is_refused(responses: list[GenerateResponse]) -> None:
    with pytest.raises(InternalError):
        list(_events(*responses))


def test_an_event_of_a_later_version_is_skipped() -> None:
    assert [type(event) for event in _events(STARTED, GenerateResponse(), FINISHED)] == [Started, Finished]


def test_measurements_of_an_answer() -> None:
    answer = Answer(asked_at_s=10.0)
    times = iter([10.1, 10.5, 11.5, 11.6])
    shown = [answer.add(event, next(times)) for event in _events(*WHOLE)]
    assert shown == ["", "Par", "is.", ""]
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("Paris.", [1, 2, 3], "stop")
    assert answer.ttft_s == pytest.approx(0.5)
    assert answer.tpot_s == pytest.approx(0.5)  # one second for the two tokens after the first
    first, server, moved = answer.statistics()
    assert first == "TTFT 500.0 ms, TPOT 500.0 ms (2.0 tokens/s), 5 prompt + 3 completion tokens (stop)"
    assert server == "prefill 20.0 ms, 0.0 ms in its queue, decode 0.0 ms"
    assert moved == "KV over NIXL: 3145728 bytes (3.00 MiB), 2 blocks, 300 tokens, pulled and verified in 1.5 ms"


def test_an_answer_of_one_token_has_no_tpot() -> None:
    answer = Answer(asked_at_s=0.0)
    assert (answer.ttft_s, answer.tpot_s, answer.statistics()) == (None, None, ["the answer was not finished"])
    for event in _events(STARTED, _delta(0, [1], ""), FINISHED):
        answer.add(event, 1.0)
    assert (answer.ttft_s, answer.tpot_s) == (1.0, None)


def test_generate_prints_the_answer(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Capital of France?", "--address", address, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris.\n"
    assert "5 prompt + 3 completion tokens (stop)" in err


def test_generate_as_json(fake: FakeInference, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--address", address, "--json", "--system", "s"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == "Paris."
    assert answer["token_ids"] == [1, 2, 3]
    assert (answer["request_id"], answer["seed"]) == ("r-1", 7)
    assert answer["kv_transfer"] == {"bytes": 3 << 20, "blocks": 2, "tokens": 300}
    assert answer["server"]["prefill_s"] == pytest.approx(0.02)
    assert [message.role for message in fake.requests[0].chat.messages] == ["system", "user"]


def test_every_flag_of_sampling_reaches_the_server(fake: FakeInference, address: str) -> None:
    flags = (
        "--temperature 0.5 --top-k 3 --top-p 0.25 --min-p 0.125 --repetition-penalty 1.5 --presence-penalty -1 "
        "--frequency-penalty 0.5 --logit-bias 7=-1.5 --logit-bias 3=4 --seed 5 --max-tokens 9 --min-tokens 2 "
        "--stop-token-id 11 --ignore-eos --stop END --logprobs 0 --prompt-logprobs 3"
    )
    assert main(["generate", "x", "--address", address, *flags.split()]) == 0
    assert fake.requests[0].sampling == SamplingParams(
        temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, repetition_penalty=1.5, presence_penalty=-1,
        frequency_penalty=0.5, logit_bias={7: -1.5, 3: 4}, seed=5, logprobs=0, prompt_logprobs=3,
    )  # fmt: skip
    assert fake.requests[0].stop == StopConditions(
        max_tokens=9, min_tokens=2, stop_token_ids=[11], ignore_eos=True, stop=["END"]
    )


def test_several_answers(fake: FakeInference, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answer([
        STARTED,
        GenerateResponse(delta=Delta(index=0, token_ids=[9], text="x", choice=1)),
        GenerateResponse(delta=Delta(index=0, token_ids=[8, 7], text="y\n")),
        GenerateResponse(finished=Finished(choice=1)),
        GenerateResponse(delta=Delta(index=2, token_ids=[6], text="z")),
        GenerateResponse(finished=Finished(choice=0)),
    ])  # fmt: skip
    assert main(["generate", "x", "--address", address, "--n", "2"]) == 0
    assert capsys.readouterr().out == "[0] y\nz\n[1] x\n"
    assert fake.requests[0].n == 2
    assert main(["generate", "x", "--address", address, "--n", "2", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(answer["choice"], answer["token_ids"]) for answer in answers] == [(0, [8, 7, 6]), (1, [9])]


def test_a_choice_that_was_not_asked_for_is_refused() -> None:
    with pytest.raises(InternalError, match="choice 1, which has finished or was not asked for"):
        list(_events(STARTED, GenerateResponse(delta=Delta(choice=1)), FINISHED))


def test_log_probabilities_as_json(fake: FakeInference, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    of_token = TokenLogprobs(logprob=-0.5, top_token_ids=[7, 9], top_logprobs=[-0.25, -0.5])
    fake.answer([
        STARTED,
        GenerateResponse(prompt_logprobs=PromptLogprobs(logprobs=[of_token, TokenLogprobs(logprob=-2)])),
        GenerateResponse(delta=Delta(index=0, token_ids=[9], text="x", logprobs=[of_token])),
        WHOLE[-1],
    ])  # fmt: skip
    assert main(["generate", "x", "--address", address, "--json", "--logprobs", "2", "--prompt-logprobs", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    told = {"logprob": -0.5, "top": [{"token_id": 7, "logprob": -0.25}, {"token_id": 9, "logprob": -0.5}]}
    assert (answer["logprobs"], answer["prompt_logprobs"]) == ([told], [told, {"logprob": -2, "top": []}])


def test_generate_reads_stdin(fake: FakeInference, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a long\ntext"))
    assert main(["generate", "-", "--raw", "--address", address]) == 0
    assert fake.requests[0].text == "a long\ntext"


def test_generate_tells_an_error_in_one_line(
    fake: FakeInference, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fail(OverloadedError("full:\n4 of 4", retry_after_s=2.0), WHOLE[:2])
    assert main(["generate", "x", "--address", address]) == 1
    out, err = capsys.readouterr()
    assert out == "Par\n"
    assert err == "zipserve: OVERLOADED: full: 4 of 4; try again in 2 s\n"


def test_generate_refuses_a_system_message_without_template(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--raw", "--system", "s"]) == 2
    assert "--raw" in capsys.readouterr().err


def test_ctrl_c_cancels_the_call(
    fake: FakeInference, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    fake.hang(*WHOLE[:2])
    monkeypatch.setattr("zipserve.cli.generate.write", interrupt)
    assert main(["generate", "x", "--address", address]) == 130
    assert fake.cancelled.wait(10)


def _chat(address: str, monkeypatch: pytest.MonkeyPatch, *lines: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(["chat", "--address", address, "--system", "s"])


def _roles(request: GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def test_chat_keeps_and_resets_its_history(
    fake: FakeInference, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _chat(address, monkeypatch, "one", "", "two", "/reset", "three", "/quit", "never") == 0
    assert capsys.readouterr().out == "Paris.\n" * 3
    system = ("system", "s")
    assert [_roles(request) for request in fake.requests] == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", "Paris."), ("user", "two")],
        [system, ("user", "three")],
    ]


def test_chat_forgets_a_turn_that_failed(
    fake: FakeInference, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fail(OverloadedError("full"))
    assert _chat(address, monkeypatch, "one", "two") == 0
    assert _roles(fake.requests[1]) == [("system", "s"), ("user", "two")]
    assert capsys.readouterr().err.count("zipserve: OVERLOADED: full") == 2


def test_ctrl_c_in_a_chat_ends_the_answer_only(
    fake: FakeInference, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if text == "Par":
            fake.answer([STARTED, FINISHED])
            raise KeyboardInterrupt

    fake.hang(*WHOLE[:2])
    monkeypatch.setattr("zipserve.cli.chat.write", write)
    assert _chat(address, monkeypatch, "one", "two") == 0
    assert fake.cancelled.wait(10)
    assert _roles(fake.requests[1])[1:] == [("user", "one"), ("assistant", "Par"), ("user", "two")]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["python"].startswith("3.")
    assert set(lines) >= {"zipserve", "torch", "transformers", "nixl"}
