"""How tokens are drawn: the domain form of zipserve.v1.SamplingParams, validated."""

import math
from dataclasses import dataclass, replace

from zipserve.common.errors import InvalidRequestError
from zipserve.v1 import sampling_pb2

TEMPERATURE_MAX = 100.0
REPETITION_PENALTY_MIN = 1 / 16
REPETITION_PENALTY_MAX = 16.0
PENALTY_MAX = 2.0
LOGIT_BIAS_MAX = 100.0
LOGIT_BIAS_ENTRIES_MAX = 1024
LOGPROBS_MAX = 20
CHOICES_MAX = 16
"""Choices of one prompt."""
SEED_MAX = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """How the token at a position is drawn; together with (seed, position) it determines the token for given logits
    and given tokens before it.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    seed: int = 0
    min_p: float = 0.0
    """Keep the tokens that are at least this fraction as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of the prompt and generated ones."""
    presence_penalty: float = 0.0
    """Taken off the logits of generated tokens."""
    frequency_penalty: float = 0.0
    """Taken off the logits of generated tokens, for each time."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token id and what is added to its logit; by rising id."""
    logprobs: int | None = None
    """How many of the most likely tokens are told beside each generated one with their log-probabilities; None: not
    even its own is."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, TEMPERATURE_MAX)
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InvalidRequestError(
                f"sampling.top_p is {self.top_p}, must be above 0 and at most 1", field="sampling.top_p"
            )
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, REPETITION_PENALTY_MIN, REPETITION_PENALTY_MAX)
        _check_range("presence_penalty", self.presence_penalty, -PENALTY_MAX, PENALTY_MAX)
        _check_range("frequency_penalty", self.frequency_penalty, -PENALTY_MAX, PENALTY_MAX)
        if len(self.logit_bias) > LOGIT_BIAS_ENTRIES_MAX:
            raise InvalidRequestError(
                f"sampling.logit_bias has {len(self.logit_bias)} entries, at most {LOGIT_BIAS_ENTRIES_MAX} are allowed",
                field="sampling.logit_bias",
            )
        for token_id, bias in self.logit_bias:
            _check_range(f"logit_bias[{token_id}]", bias, -LOGIT_BIAS_MAX, LOGIT_BIAS_MAX)
        _check_range("logprobs", self.logprobs or 0, 0, LOGPROBS_MAX)
        _check_range("prompt_logprobs", self.prompt_logprobs or 0, 0, LOGPROBS_MAX)

    @property
    def penalizes(self) -> bool:
        """Whether the tokens before a position play a part."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)

    def of_choice(self, choice: int) -> "Sampling":
        """How the tokens of the choice of an index are drawn: by a seed of its own."""
        return replace(self, seed=(self.seed + choice) & SEED_MAX)

    def check_ids(self, vocab_tokens: int) -> None:
        """Raises InvalidRequestError if a token id is not below the vocabulary's size."""
        for token_id, _ in self.logit_bias:
            if token_id >= vocab_tokens:
                raise InvalidRequestError(
                    f"sampling.logit_bias has token id {token_id}, must lie below the vocabulary's size of "
                    f"{vocab_tokens}",
                    field=f"sampling.logit_bias[{token_id}]",
                )

    @classmethod
    def from_proto(cls, message: sampling_pb2.SamplingParams, default_seed: int = 0) -> "Sampling":
        """Reads a message, with the defaults that the proto documents.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
        return cls(
            temperature=message.temperature if message.HasField("temperature") else 1.0,
            top_k=message.top_k,
            top_p=message.top_p if message.HasField("top_p") else 1.0,
            seed=message.seed if message.HasField("seed") else default_seed,
            min_p=message.min_p,
            repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            logit_bias=tuple(sorted(message.logit_bias.items())),
            logprobs=message.logprobs if message.HasField("logprobs") else None,
            prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        )

    def to_proto(self) -> sampling_pb2.SamplingParams:
        """The message with every field set that is not None."""
        return sampling_pb2.SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=dict(self.logit_bias),
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequestError(
            f"sampling.{field} is {value}, must be between {low:g} and {high:g}", field=f"sampling.{field}"
        )
