"""How to generate: what chat and completion requests have in common, as fields of JSON and as the domain's messages.

Names and meanings are OpenAI's, and vLLM's for what OpenAI has not. Ranges are the domain's to check.
"""

from typing import Annotated, Any

from pydantic import Field, PlainValidator

from zipserve.common.errors import InvalidRequestError
from zipserve.router.http.fields import Body, Ids, Ignored, Int32, Uint32, shown
from zipserve.router.http.guides import GuideFields
from zipserve.v1.inference_service_pb2 import GenerateRequest
from zipserve.v1.sampling_pb2 import SamplingParams, StopConditions

_SEED_MASK = (1 << 64) - 1


def _strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise ValueError("must be a string or a list of strings")
    return tuple(texts)


class StreamOptions(Body):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None
    """A last chunk with the counted tokens."""
    include_obfuscation: bool | None = None
    """Padding against those who see sizes of packets; not served."""


class Parameters(GuideFields):
    """Fields of both kinds of requests."""

    model: str | None = None
    """None: the only model served."""
    n: Uint32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_strings)] = ()
    max_tokens: Uint32 | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Uint32, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Ignored = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 32)] | None = None
    """-1 and 0: all."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    min_tokens: Uint32 | None = None
    prompt_logprobs: Uint32 | None = None
    priority: Int32 | None = None
    """As vLLM has it: lower goes first."""
    cache_salt: str | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return bool(self.stream)

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the counted tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raises InvalidRequestError for fields that do not go together."""
        options = self.stream_options
        if options is not None and not self.streams:
            raise InvalidRequestError("stream_options needs stream to be true", field="stream_options")
        if options is not None and options.include_obfuscation:
            raise InvalidRequestError(
                "stream_options.include_obfuscation is true, which this server does not support",
                field="stream_options.include_obfuscation",
            )
        if self.streams and self.prompt_logprobs is not None:
            raise InvalidRequestError(
                f"prompt_logprobs is {self.prompt_logprobs}, which a stream does not tell", field="prompt_logprobs"
            )
        if self.n == 0:
            raise InvalidRequestError("n is 0, must be at least 1", field="n")

    def to_proto(self, max_tokens: int | None, logprobs: int | None) -> GenerateRequest:
        """All but the prompt.

        Args:
            max_tokens: most tokens to generate; None: the server's default.
            logprobs: how many likely tokens are told beside each generated one; None: not even its own probability.
        """
        priority = -(self.priority or 0)
        if priority >= 1 << 31:
            raise InvalidRequestError(
                f"priority is {shown(self.priority)}, must be above -2147483648", field="priority"
            )
        return GenerateRequest(
            model=self.model or "",
            sampling=SamplingParams(
                temperature=self.temperature,
                top_k=max(self.top_k or 0, 0),
                top_p=self.top_p,
                seed=None if self.seed is None else self.seed & _SEED_MASK,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias=self.logit_bias,
                logprobs=logprobs,
                prompt_logprobs=self.prompt_logprobs,
            ),
            stop=StopConditions(
                max_tokens=max_tokens,
                stop=self.stop,
                stop_token_ids=self.stop_token_ids,
                ignore_eos=bool(self.ignore_eos),
                min_tokens=self.min_tokens or 0,
            ),
            n=self.n or 1,
            priority=priority,
            cache_salt=self.cache_salt or "",
            guide=self.guide(),
        )
