"""How tokens are drawn: the domain form of zipserve.v1.SamplingParams, validated."""

import math
from dataclasses import dataclass

from zipserve.common.errors import InvalidRequestError
from zipserve.v1 import sampling_pb2

TEMPERATURE_MAX = 100.0
SEED_MAX = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """How the token at a position is drawn; together with (seed, position) it determines the token for given logits."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= TEMPERATURE_MAX):
            raise InvalidRequestError(
                f"sampling.temperature is {self.temperature}, must be between 0 and {TEMPERATURE_MAX:g}",
                field="sampling.temperature",
            )
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InvalidRequestError(
                f"sampling.top_p is {self.top_p}, must be above 0 and at most 1", field="sampling.top_p"
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
        )

    def to_proto(self) -> sampling_pb2.SamplingParams:
        """The message with every field set."""
        return sampling_pb2.SamplingParams(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed
        )
