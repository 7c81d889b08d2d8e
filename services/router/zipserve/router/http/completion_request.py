"""POST /v1/completions: the request."""

from typing import Annotated, Any

from pydantic import PlainValidator

from zipserve.common.errors import InvalidRequestError
from zipserve.router.http.fields import Uint32, Unsupported
from zipserve.router.http.parameters import Parameters
from zipserve.v1.inference_service_pb2 import GenerateRequest, TokenIds

MAX_TOKENS_DEFAULT = 16
"""OpenAI's."""
_ID_END = 1 << 32

Prompt = str | list[int]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _ID_END for item in value)


def _prompts(value: Any) -> list[Prompt]:
    if isinstance(value, str) or (value and _is_ids(value)):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, str) or _is_ids(item) for item in value):
        return value
    raise ValueError("must be a string, a list of token ids, or a list of at least one of either")


class CompletionRequest(Parameters):
    """Prompts to go on with."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    echo: bool | None = None
    logprobs: Uint32 | None = None
    best_of: Uint32 | None = None
    suffix: Unsupported = None

    @property
    def only_echo(self) -> bool:
        """Whether nothing is to be generated: the prompt's own probabilities are what is asked for."""
        return self.max_tokens == 0 and bool(self.echo)

    def to_generate(self, prompts_max: int) -> list[GenerateRequest]:
        """The domain's requests, one for each prompt.

        Raises:
            InvalidRequestError: fields do not go together, or there are more prompts than allowed.
        """
        self.check()
        n = self.n or 1
        if self.best_of not in (None, n):
            raise InvalidRequestError(
                f"best_of is {self.best_of}; answers are not ranked here, so that it must be n, which is {n}",
                field="best_of",
            )
        if len(self.prompt) > prompts_max:
            raise InvalidRequestError(
                f"prompt has {len(self.prompt)} prompts, at most {prompts_max} are allowed", field="prompt"
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("max_tokens is 0, which needs echo to be true", field="max_tokens")
        max_tokens = self.max_tokens
        if max_tokens is None:
            max_tokens = max(MAX_TOKENS_DEFAULT, self.min_tokens or 0)
        # the domain generates at least one, which is then left out
        request = self.to_proto(max(max_tokens, 1), self.logprobs)
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            request.sampling.prompt_logprobs = self.logprobs
        return [_with_prompt(request, prompt) for prompt in self.prompt]

    def names(self, index: int) -> dict[str, str]:
        """What the domain's fields are called here, for the prompt of an index."""
        prompt = "prompt" if len(self.prompt) == 1 else f"prompt[{index}]"
        names = {"prompt": prompt, "token_ids.ids": prompt}
        if self.echo and self.prompt_logprobs is None:
            names["sampling.prompt_logprobs"] = "logprobs"
        guide = self.guide_field
        kinds = ("json_schema", "json_object", "regex", "choices", "grammar")
        return names | {"guide": guide} | {f"guide.{kind}": guide for kind in kinds} if guide else names


def _with_prompt(request: GenerateRequest, prompt: Prompt) -> GenerateRequest:
    whole = GenerateRequest()
    whole.CopyFrom(request)
    if isinstance(prompt, str):
        whole.text = prompt
    else:
        whole.token_ids.CopyFrom(TokenIds(ids=prompt))
    return whole
