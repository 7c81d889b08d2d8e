"""What a request has generated so far: tokens by position, their text, and whether it has ended.

Every token enters here exactly once, whichever worker made it; that is what makes a replay invisible.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from zipserve.common.errors import InternalError
from zipserve.router.detokenizer import Detokenizer
from zipserve.router.job import Job
from zipserve.router.stop import StopMatcher
from zipserve.v1.sampling_pb2 import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class Chunk:
    """New tokens and text for the client."""

    index: int
    """Index of the first token among the generated ones."""
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each token, if they are asked for."""
    choice: int = 0
    """Which of the answers to the prompt."""
    ends: bool = False
    """Whether nothing follows."""

    def __bool__(self) -> bool:
        return bool(self.token_ids or self.text)


class Transcript:
    """The output of one request."""

    def __init__(self, job: Job, detokenizer: Detokenizer) -> None:
        self._job = job
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(job.stop)
        self.token_ids: list[int] = []
        """The generated tokens, the one that ended the generation included."""
        self.finish: FinishReason.ValueType | None = None
        """Why the generation ended; None while it has not."""
        self.stop_string: str | None = None
        """The stop string that ended it, if one did."""

    @property
    def position(self) -> int:
        """Position of the next token in the sequence."""
        return len(self._job.prompt) + len(self.token_ids)

    @property
    def stop_cause(self) -> str:
        """What ended the generation: a stop string, a token, or the length; empty while it goes on."""
        if self.finish is None:
            return ""
        if self.finish == FinishReason.FINISH_REASON_LENGTH:
            return "length"
        return "token" if self.stop_string is None else "string"

    @property
    def sequence(self) -> list[int]:
        """The prompt's tokens and the generated ones."""
        return [*self._job.prompt, *self.token_ids]

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self._job.max_tokens - len(self.token_ids)

    def append(
        self,
        position: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        *,
        complete: bool = False,
    ) -> Chunk:
        """Takes the tokens that a worker made from `position` on; those after the end of the generation are dropped.

        Args:
            complete: the last of them completes what the guide asks for.

        Raises:
            InternalError: they do not follow the tokens before them, or lack the log-probabilities that were asked for.
        """
        if len(logprobs) != (len(token_ids) if self._job.sampling.logprobs is not None else 0):
            raise InternalError(f"a worker sent log-probabilities of {len(logprobs)} for {len(token_ids)} tokens")
        if position != self.position:
            raise InternalError(f"a worker sent tokens from position {position} on, expected {self.position}")
        start = len(self.token_ids)
        text = ""
        for i, token_id in enumerate(token_ids, start=1):
            if self.finish is not None:
                break
            text += self._append(token_id, complete=complete and i == len(token_ids))
        taken = tuple(self.token_ids[start:])
        return Chunk(start, taken, text, tuple(logprobs[: len(taken)]), self._job.choice, self.finish is not None)

    def end(self, reason: FinishReason.ValueType) -> Chunk:
        """Ends the generation at a worker's word, and returns the text still held back."""
        return Chunk(len(self.token_ids), (), self._end(reason), choice=self._job.choice, ends=True)

    def _append(self, token_id: int, *, complete: bool) -> str:
        self.token_ids.append(token_id)
        if token_id in self._job.stop_token_ids:
            return self._end(FinishReason.FINISH_REASON_STOP)
        text = self._release(self._detokenizer.push(token_id))
        if self.finish is None and complete:
            text += self._end(FinishReason.FINISH_REASON_STOP)
        elif self.finish is None and self.remaining == 0:
            text += self._end(FinishReason.FINISH_REASON_LENGTH)
        return text

    def _release(self, text: str) -> str:
        if len(self.token_ids) <= self._job.min_tokens:
            return text
        released = self._matcher.feed(text)
        if released.stop is not None:
            self.finish = FinishReason.FINISH_REASON_STOP
            self.stop_string = released.stop
        return released.text

    def _end(self, reason: FinishReason.ValueType) -> str:
        text = self._release(self._detokenizer.flush())
        if self.finish is None:
            self.finish = reason
            text += self._matcher.flush()
        return text
