"""POST /v1/chat/completions: the request."""

from typing import Literal

from zipserve.common.errors import InvalidRequestError
from zipserve.router.http.fields import Ignored, Uint32, Unsupported
from zipserve.router.http.messages import Conversation
from zipserve.router.http.parameters import Parameters
from zipserve.router.http.tools import ToolFields
from zipserve.v1.inference_service_pb2 import GenerateRequest


class ChatRequest(Conversation, ToolFields, Parameters):
    """A conversation to go on with."""

    max_completion_tokens: Uint32 | None = None
    logprobs: bool | None = None
    top_logprobs: Uint32 | None = None
    # What has one meaning here only, and is accepted with that.
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    prompt_cache_key: Ignored = None
    safety_identifier: Ignored = None
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    metadata: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    def to_generate(self, *, tools_known: bool) -> GenerateRequest:
        """The domain's request.

        Args:
            tools_known: the model can be told of tools.

        Raises:
            InvalidRequestError: fields do not go together.
        """
        self.check()
        self.check_tools(known=tools_known)
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidRequestError(
                f"max_completion_tokens is {self.max_completion_tokens} and max_tokens is {self.max_tokens}, at most "
                "one of them may be set",
                field="max_completion_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                f"top_logprobs is {self.top_logprobs}, needs logprobs to be true", field="top_logprobs"
            )
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        request = self.to_proto(max_tokens, (self.top_logprobs or 0) if self.logprobs else None)
        request.chat.CopyFrom(self.to_prompt([tool.text() for tool in self.offered]))
        self._call_tools(request)
        return request

    @property
    def names(self) -> dict[str, str]:
        """What the domain's fields are called here."""
        tokens = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        guide = self.guide_field or "tool_choice"
        return {
            "prompt": "messages",
            "stop.max_tokens": tokens,
            "sampling.logprobs": "top_logprobs",
            "guide": guide,
            **{f"guide.{kind}": guide for kind in ("json_schema", "json_object", "regex", "choices", "grammar")},
        }

    def _call_tools(self, request: GenerateRequest) -> None:
        guide = self.tool_guide()
        if self.offered and request.HasField("guide"):
            raise InvalidRequestError(
                f"{self.guide_field} and tools are set; with a format of its own the answer cannot call a tool, set "
                'tool_choice to "none"',
                field=self.guide_field,
            )
        if guide is not None:
            request.guide.CopyFrom(guide)
        request.stop.stop.extend(self.stops())
