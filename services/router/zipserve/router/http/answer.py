"""What the answers of all routes have in common: who answers, what was counted, why it ended."""

from dataclasses import dataclass, field
from typing import Any

from zipserve.router.frontend import Finished
from zipserve.v1.sampling_pb2 import FinishReason

_REASONS = {FinishReason.FINISH_REASON_STOP: "stop", FinishReason.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True)
class Head:
    """Fields that an answer and each of its chunks begin with."""

    id: str
    created_s: int
    """Seconds since 1970."""
    model: str
    revision: str

    def fields(self, kind: str) -> dict[str, Any]:
        """As JSON, for an object of a kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": f"fp_{self.revision[:12]}",
        }


@dataclass
class Usage:
    """Tokens of all prompts and choices of a request; a prompt counts once, however many choices it has."""

    _prompts: dict[int, tuple[int, int]] = field(default_factory=dict)
    _completion_tokens: int = 0

    def count(self, prompt: int, finished: Finished, *, generated: bool = True) -> None:
        """Adds a choice of the prompt of an index; what it generated only where the client is told of it."""
        self._prompts[prompt] = (finished.prompt_tokens, finished.report.cached_tokens)
        self._completion_tokens += finished.completion_tokens if generated else 0

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }


def reason_of(finished: Finished) -> str:
    """Why a choice ended."""
    return _REASONS[finished.reason]
