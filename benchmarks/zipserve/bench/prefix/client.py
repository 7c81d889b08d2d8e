"""Asks a running stack, and notes what a client sees."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zipserve.common.rpc.status import client_errors
from zipserve.v1.inference_service_pb2 import ChatMessage, ChatPrompt, GenerateRequest, TokenIds
from zipserve.v1.sampling_pb2 import SamplingParams, StopConditions

if TYPE_CHECKING:  # this name exists in the stubs only
    from zipserve.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub


@dataclass
class Answer:
    """To one prompt."""

    first_token_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, those that were not computed."""


class Client:
    """Greedy requests of one stack."""

    def __init__(self, stub: "InferenceServiceAsyncStub") -> None:
        self._stub = stub

    async def complete(self, token_ids: list[int], new_tokens: int, cache_salt: str = "") -> Answer:
        """Goes on from token ids.

        Raises:
            ZipserveError: the request failed.
        """
        return await self._ask(GenerateRequest(token_ids=TokenIds(ids=token_ids), cache_salt=cache_salt), new_tokens)

    async def chat(self, messages: list[ChatMessage], new_tokens: int) -> Answer:
        """Answers a conversation.

        Raises:
            ZipserveError: the request failed.
        """
        return await self._ask(GenerateRequest(chat=ChatPrompt(messages=messages)), new_tokens)

    async def _ask(self, request: GenerateRequest, new_tokens: int) -> Answer:
        request.sampling.CopyFrom(SamplingParams(temperature=0.0))
        request.stop.CopyFrom(StopConditions(max_tokens=new_tokens))
        answer, sent_s = Answer(), time.perf_counter()
        with client_errors():
            async for event in self._stub.Generate(request):
                if event.HasField("delta"):
                    if not answer.token_ids:
                        answer.first_token_s = time.perf_counter() - sent_s
                    answer.token_ids += event.delta.token_ids
                    answer.text += event.delta.text
                elif event.HasField("finished"):
                    usage = event.finished.usage
                    answer.prompt_tokens, answer.cached_tokens = usage.prompt_tokens, usage.cached_prompt_tokens
        return answer
