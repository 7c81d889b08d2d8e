"""How a session reaches workers, and what it asks of them: from choices, which share what they were given."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from zipserve.common.sampling import Sampling
from zipserve.router.choice import Choice
from zipserve.router.policy import Worker
from zipserve.v1.decode_service_pb2 import DecodeRequest, DecodeResponse, EndSequenceRequest, Sibling
from zipserve.v1.kv_pb2 import KvHandle
from zipserve.v1.prefill_service_pb2 import PrefillRequest, PrefillResponse


class Workers(Protocol):
    """The workers, as a session reaches them. Calls raise ZipserveError."""

    def prefills(self) -> Sequence[Worker]:
        """Prefill workers that take work."""

    def decodes(self) -> Sequence[Worker]:
        """Decode workers that take work."""

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns when there may be news of the workers, or after the time."""

    async def prefill(self, worker: Worker, request: PrefillRequest, timeout_s: float) -> PrefillResponse:
        """Computes a prompt."""

    def decode(self, worker: Worker, request: DecodeRequest, timeout_s: float) -> AsyncGenerator[DecodeResponse, None]:
        """Continues a sequence. Closing the generator cancels the call."""

    def release(self, worker: Worker, handle: KvHandle, request_id: str) -> None:
        """Gives up a handle, in the background."""

    def end_sequence(self, worker: Worker, request: EndSequenceRequest, request_id: str) -> None:
        """Ends one of several sequences of a call, in the background."""

    def report_lost(self, worker: Worker) -> None:
        """Hides a worker that could not be reached, until it shows that it lives."""


def prefill_request(choices: Sequence[Choice], worker: Worker, sampling: Sampling) -> PrefillRequest:
    """For the tokens that all choices have so far."""
    job = choices[0].job
    return PrefillRequest(
        request_id=job.request_id,
        token_ids=choices[0].transcript.sequence,
        sampling=sampling.to_proto(),
        layout_fingerprint=worker.writable_layout,
        priority=job.priority,
        prompt_tokens=len(job.prompt),
        min_tokens=job.min_tokens,
        stop_token_ids=sorted(job.stop_token_ids),
        choices=len(choices),
        cache_salt=job.cache_salt,
        guide=job.guide.to_proto() if job.guide else None,
    )


def decode_request(
    choices: Sequence[Choice], answer: PrefillResponse | None, sampling: Sampling, stream_id: bytes
) -> DecodeRequest:
    """To go on from what was prefilled, or without an answer to compute the first choice's tokens as well.

    Args:
        sampling: of the first choice.
        stream_id: names the call, if there is an answer.
    """
    job, first = choices[0].job, choices[0].transcript
    request = DecodeRequest(
        request_id=job.request_id,
        sampling=sampling.to_proto(),
        max_new_tokens=first.remaining,
        stop_token_ids=sorted(job.stop_token_ids),
        priority=job.priority,
        prompt_tokens=len(job.prompt),
        min_tokens=job.min_tokens,
        cache_salt=job.cache_salt,
        guide=job.guide.to_proto() if job.guide else None,
    )
    if answer is None:
        request.prompt_token_ids.extend(first.sequence)
    else:
        request.handle.CopyFrom(answer.handle)
        request.token_id = first.token_ids[-1]
        request.past_token_ids.extend(first.sequence[:-1])
        request.siblings.extend(_sibling(choice) for choice in choices[1:])
        request.stream_id = stream_id
    return request


def _sibling(choice: Choice) -> Sibling:
    return Sibling(token_id=choice.transcript.token_ids[-1], seed=choice.job.sampling.seed)
