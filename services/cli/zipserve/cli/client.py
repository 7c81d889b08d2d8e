"""A client of zipserve's gRPC interface. Needs grpcio and protobuf only."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, cast

import grpc

from zipserve.common.errors import InternalError
from zipserve.common.rpc.status import FailedCall, from_rpc_error
from zipserve.v1.inference_service_pb2 import (
    ChatMessage,
    ChatPrompt,
    Delta,
    Finished,
    GenerateRequest,
    GenerateResponse,
    ListModelsRequest,
    Model,
    PromptLogprobs,
    Started,
)
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.sampling_pb2 import SamplingParams, StopConditions

Event = Started | PromptLogprobs | Delta | Finished
"""One event of an answer: started once, then the prompt's log-probabilities if they were asked for, then deltas and
finished of each choice."""

_LOCAL_HOSTS = ("127.", "localhost:", "[::1]:")


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    """"system", "user" or "assistant", or what else the model's template knows."""
    content: str


class Client:
    """A connection to a router. Safe to use from several threads; close it, or use it as a context manager."""

    def __init__(self, address: str, *, message_bytes_max: int = 4 << 20) -> None:
        """Connects to host:port on first use."""
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", message_bytes_max),
                ("grpc.max_send_message_length", message_bytes_max),
                ("grpc.keepalive_time_ms", 20_000),
                # http_proxy is not meant for this machine itself, whether no_proxy says so or not.
                ("grpc.enable_http_proxy", int(not address.startswith(_LOCAL_HOSTS))),
            ],
        )
        self._stub = InferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        model: str = "",
        n: int = 1,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        ignore_eos: bool = False,
        timeout_s: float | None = None,
    ) -> "Stream":
        """Starts an answer. Parameters that are None are left to the server.

        Args:
            prompt: plain text, sent as it is; or a conversation, rendered with the model's chat template.
            model: id; empty for the only one served.
            n: choices to generate.
            logit_bias: added to the logits of these tokens.
            logprobs: tell log-probabilities of the generated tokens, and of so many of the most likely ones.
            timeout_s: longest time for the whole answer. None: no limit.
        """
        request = GenerateRequest(
            model=model,
            n=n,
            sampling=SamplingParams(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=logit_bias,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            ),
            stop=StopConditions(
                max_tokens=max_tokens,
                stop=stop,
                stop_token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
                min_tokens=min_tokens,
            ),
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            messages = [ChatMessage(role=message.role, content=message.content) for message in prompt]
            request.chat.CopyFrom(ChatPrompt(messages=messages))
        return Stream(self._stub.Generate(request, timeout=timeout_s), n)

    def models(self, timeout_s: float | None = 10.0) -> list[Model]:
        """The models served.

        Raises:
            ZipserveError: the call failed.
        """
        try:
            return list(self._stub.ListModels(ListModelsRequest(), timeout=timeout_s).models)
        except grpc.RpcError as error:
            raise from_rpc_error(cast(FailedCall, error)) from error

    def close(self) -> None:
        """Ends the connection and cancels running answers."""
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Call(Protocol):
    """What a stream needs of gRPC's call."""

    def __next__(self) -> GenerateResponse: ...

    def cancel(self) -> bool: ...


class Stream(Iterator[Event]):
    """The events of the answer to one request, as they come; checked, so that no token is lost or repeated unnoticed.

    Iterating raises a ZipserveError when the call failed. Leaving the context cancels what is still running.
    """

    def __init__(self, call: _Call, n: int = 1) -> None:
        self._call = call
        self._tokens = dict.fromkeys(range(n), 0)
        """Of each choice that has not finished."""
        self._started = False

    def __next__(self) -> Event:
        while (event := self._check(self._next_response())) is None:
            pass
        return event

    def _next_response(self) -> GenerateResponse:
        try:
            return next(self._call)
        except StopIteration:
            if self._tokens:
                raise InternalError("the answer ended without its last event") from None
            raise
        except grpc.RpcError as error:
            raise from_rpc_error(cast(FailedCall, error)) from error

    def _check(self, response: GenerateResponse) -> Event | None:
        kind = response.WhichOneof("event")
        if kind is None:
            return None  # of a kind that a later version knows
        if not self._tokens or self._started == (kind == "started"):
            raise InternalError(f"the answer has the event {kind!r} out of order")
        match kind:
            case "started":
                self._started = True
                return response.started
            case "finished":
                self._running(response.finished.choice)
                del self._tokens[response.finished.choice]
                return response.finished
            case "prompt_logprobs":
                return response.prompt_logprobs
            case _:
                return self._check_delta(response.delta)

    def _check_delta(self, delta: Delta) -> Delta:
        due = self._running(delta.choice)
        if delta.index != due:
            raise InternalError(f"the answer has token {delta.index} where token {due} was due")
        self._tokens[delta.choice] += len(delta.token_ids)
        return delta

    def _running(self, choice: int) -> int:
        """Tokens of a choice so far."""
        if choice not in self._tokens:
            raise InternalError(f"the answer goes on with choice {choice}, which has finished or was not asked for")
        return self._tokens[choice]

    def cancel(self) -> None:
        """Ends the answer; the server frees everything at once. May be called from any thread."""
        self._call.cancel()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
