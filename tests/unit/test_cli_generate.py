"""The commands that talk to a router, against a small server in this process."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme

from inference_server import FINISHED, STARTED, WHOLE, FakeInference, delta, serving
from zipserve.cli.__main__ import main
from zipserve.cli.answer import Answer
from zipserve.client import Stream
from zipserve.client.retry import Attempts, Retry
from zipserve.common.errors import InternalError, OverloadedError
from zipserve.v1.inference_service_pb2 import (
    Delta,
    Finished,
    GenerateRequest,
    GenerateResponse,
    PromptLogprobs,
)
from zipserve.v1.sampling_pb2 import SamplingParams, StopConditions, TokenLogprobs


@pytest.fixture
def fake() -> FakeInference:
    return FakeInference()


@pytest.fixture
def address(fake: FakeInference) -> Iterator[str]:
    with serving(fake) as address:
        yield address


def _events(*responses: GenerateResponse) -> Stream:
    class Call(Iterator[GenerateResponse]):
        def __init__(self) -> None:
            self._left = iter(responses)

        def __next__(self) -> GenerateResponse:
            return next(self._left)

        def cancel(self) -> bool:
            return True

    return Stream(Call, Attempts(Retry(), None))


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
    for event in _events(STARTED, delta(0, [1], ""), FINISHED):
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


def test_a_key_and_tls(fake: FakeInference, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "key").write_text("zs-secret\n")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    with serving(fake, grpc.ssl_server_credentials([pair])) as address:
        options = [
            "--address",
            address,
            "--tls-roots",
            str(tmp_path / "ca.pem"),
            "--api-key-file",
            str(tmp_path / "key"),
        ]
        assert main(["generate", "x", *options]) == 0
        assert main(["generate", "x", "--address", address, "--tls"]) == 1
    assert capsys.readouterr().out == "Paris.\n"
    assert fake.metadata[0]["authorization"] == "Bearer zs-secret"
    with pytest.raises(SystemExit, match="No such file"):
        main(["generate", "x", "--tls-roots", str(tmp_path / "none.pem")])


@pytest.mark.parametrize(("roots", "status"), [("ca.pem", 0), ("none.pem", 1)])
def test_tls_by_another_name(fake: FakeInference, tmp_path: Path, roots: str, status: int) -> None:
    """With roots where gRPC looks for them, in a process of its own: it looks once. Without them it takes its own."""
    authority = trustme.CA()
    certificate = authority.issue_cert("llm.example.com")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    environment = {**os.environ, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(tmp_path / roots)}
    with serving(fake, grpc.ssl_server_credentials([pair])) as address:
        command = [sys.executable, "-P", "-m", "zipserve.cli", "generate", "x", "--address", address]
        named = subprocess.run(
            [*command, "--tls-name", "llm.example.com"], check=False, capture_output=True, text=True, env=environment
        )
        assert named.returncode == status, named.stderr
        assert status == 0 or "CERTIFICATE_VERIFY_FAILED" in named.stderr
        unnamed = subprocess.run([*command, "--tls"], check=False, capture_output=True, text=True, env=environment)
    assert unnamed.returncode == 1


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
