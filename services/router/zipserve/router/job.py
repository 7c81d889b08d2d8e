"""A request after validation: everything that its run needs, and nothing that can still be wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

from zipserve.common.errors import InvalidRequestError
from zipserve.common.guide import Guide
from zipserve.common.sampling import CHOICES_MAX, Sampling
from zipserve.router.config import RouterSettings
from zipserve.router.facts import ModelFacts
from zipserve.v1.sampling_pb2 import StopConditions

CACHE_SALT_CHARS_MAX = 256
PROMPT_LOGPROBS_MAX = 1 << 18
"""Log-probabilities of a prompt, those of other tokens included: about 2 MB."""


@dataclass(frozen=True)
class Job:
    """One generation."""

    request_id: str
    prompt: tuple[int, ...]
    """Token ids; at least one."""
    sampling: Sampling
    """How tokens are drawn; the seed is fixed."""
    max_tokens: int
    """Most tokens to generate; at least 1, and together with the prompt within the context."""
    stop: tuple[str, ...]
    """Strings that end the generation."""
    stop_token_ids: frozenset[int]
    """Ids that end the generation, the model's own included unless they are to be ignored."""
    priority: int = 0
    """Higher goes first on every worker."""
    min_tokens: int = 0
    """Generated tokens before which nothing but max_tokens ends it."""
    cache_salt: str = ""
    """Its KV is shared only with requests of the same one."""
    guide: Guide | None = None
    """What the output must look like."""
    n: int = 1
    """How many answers to the prompt are wanted."""
    choice: int = 0
    """Which of them this is."""

    @property
    def tokens_max(self) -> int:
        """Most tokens of prompt and completion together."""
        return len(self.prompt) + self.max_tokens


def check_prompt(prompt: Sequence[int], facts: ModelFacts, tokens_max: int | None = None) -> None:
    """Raises InvalidRequestError for a prompt that is empty, too long, or has ids outside the vocabulary."""
    if not prompt:
        raise InvalidRequestError("the prompt is empty, needs at least one token", field="prompt")
    if tokens_max is not None and len(prompt) > tokens_max:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens, this router takes at most {tokens_max}", field="prompt"
        )
    if len(prompt) >= facts.context_tokens:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens; with at least one to generate it must stay within the model's "
            f"context of {facts.context_tokens}",
            field="prompt",
        )
    check_ids(prompt, facts, "token_ids.ids")


def check_prompt_logprobs(prompt_tokens: int, sampling: Sampling) -> None:
    """Raises InvalidRequestError if the prompt's log-probabilities would not fit into a message."""
    each = 1 + (sampling.prompt_logprobs or 0)
    if sampling.prompt_logprobs is not None and prompt_tokens * each > PROMPT_LOGPROBS_MAX:
        raise InvalidRequestError(
            f"sampling.prompt_logprobs of {sampling.prompt_logprobs} for {prompt_tokens} tokens are "
            f"{prompt_tokens * each} values, at most {PROMPT_LOGPROBS_MAX} are allowed",
            field="sampling.prompt_logprobs",
        )


def check_cache_salt(cache_salt: str) -> None:
    """Raises InvalidRequestError for a salt that is too long."""
    if len(cache_salt) > CACHE_SALT_CHARS_MAX:
        raise InvalidRequestError(
            f"cache_salt has {len(cache_salt)} characters, at most {CACHE_SALT_CHARS_MAX} are allowed",
            field="cache_salt",
        )


def choices_of(n: int) -> int:
    """How many answers a request wants; raises InvalidRequestError for more than CHOICES_MAX."""
    if n > CHOICES_MAX:
        raise InvalidRequestError(f"n is {n}, must be 1 to {CHOICES_MAX}", field="n")
    return n or 1


def check_stop(stop: StopConditions, facts: ModelFacts, settings: RouterSettings) -> None:
    """Raises InvalidRequestError for stop conditions outside the limits."""
    if len(stop.stop) > settings.stop_strings_max:
        raise InvalidRequestError(
            f"stop.stop has {len(stop.stop)} strings, at most {settings.stop_strings_max} are allowed",
            field="stop.stop",
        )
    for i, text in enumerate(stop.stop):
        if not 1 <= len(text) <= settings.stop_string_chars_max:
            raise InvalidRequestError(
                f"stop.stop[{i}] has {len(text)} characters, must have 1 to {settings.stop_string_chars_max}",
                field=f"stop.stop[{i}]",
            )
    if len(stop.stop_token_ids) > settings.stop_token_ids_max:
        raise InvalidRequestError(
            f"stop.stop_token_ids has {len(stop.stop_token_ids)} ids, at most {settings.stop_token_ids_max} are "
            "allowed",
            field="stop.stop_token_ids",
        )
    check_ids(stop.stop_token_ids, facts, "stop.stop_token_ids")


def completion_tokens(stop: StopConditions, prompt_tokens: int, facts: ModelFacts, settings: RouterSettings) -> int:
    """Most tokens to generate after a prompt that fits.

    Raises:
        InvalidRequestError: max_tokens is set to 0, above the limit, or beyond the context.
    """
    room = facts.context_tokens - prompt_tokens
    if not stop.HasField("max_tokens"):
        most = min(room, settings.completion_tokens_default, settings.completion_tokens_max)
        # Who asks for many at least wants more than the default.
        return max(most, min(stop.min_tokens, room, settings.completion_tokens_max))
    asked, limit = stop.max_tokens, settings.completion_tokens_max
    if not 1 <= asked <= limit:
        raise InvalidRequestError(f"stop.max_tokens is {asked}, must be 1 to {limit}", field="stop.max_tokens")
    if asked > room:
        raise InvalidRequestError(
            f"the prompt's {prompt_tokens} tokens and stop.max_tokens of {asked} are {prompt_tokens + asked} together; "
            f"the model's context is {facts.context_tokens}",
            field="stop.max_tokens",
        )
    return asked


def check_min_tokens(stop: StopConditions, max_tokens: int) -> None:
    """Raises InvalidRequestError if more tokens are asked for at least than there can be at most."""
    if stop.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"stop.min_tokens is {stop.min_tokens}, must be at most the {max_tokens} tokens that may be generated",
            field="stop.min_tokens",
        )


def check_ids(token_ids: Sequence[int], facts: ModelFacts, field: str) -> None:
    """Raises InvalidRequestError for ids outside the vocabulary; `field` names where they stand."""
    if token_ids and max(token_ids) >= facts.vocab_tokens:
        i, wrong = next((i, t) for i, t in enumerate(token_ids) if t >= facts.vocab_tokens)
        raise InvalidRequestError(
            f"{field}[{i}] is {wrong}, must lie below the vocabulary's size of {facts.vocab_tokens}",
            field=f"{field}[{i}]",
        )
