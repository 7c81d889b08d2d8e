"""The events of a streamed answer, checked. Pure."""

from typing import TypeAlias

from zipserve.common.errors import InternalError
from zipserve.v1.inference_service_pb2 import Delta, Finished, GenerateResponse, PromptLogprobs, Started

Event: TypeAlias = Started | PromptLogprobs | Delta | Finished
"""One event of an answer: started once, then the prompt's log-probabilities if they were asked for, then deltas and
finished of each choice."""


class Order:
    """Checks that events come in order, so that no token is lost or repeated unnoticed."""

    def __init__(self, n: int) -> None:
        """
        Args:
            n: choices asked for; 0: one.
        """
        self._tokens = dict.fromkeys(range(n or 1), 0)
        """Of each choice that has not finished."""
        self._started = False

    def take(self, response: GenerateResponse) -> Event | None:
        """The event of a response; None for one of a kind that a later version knows.

        Raises:
            InternalError: it is out of order.
        """
        kind = response.WhichOneof("event")
        if kind is None:
            return None
        if not self._tokens or self._started == (kind == "started"):
            raise InternalError(f"the answer has the event {kind!r} out of order")
        match kind:
            case "started":
                self._started = True
                return response.started
            case "finished":
                self._running(response.finished.choice)
                del self._tokens[response.finished.choice]
                return response.finished
            case "prompt_logprobs":
                return response.prompt_logprobs
            case _:
                return self._take_delta(response.delta)

    def end(self) -> None:
        """Raises InternalError if events are missing."""
        if self._tokens:
            raise InternalError("the answer ended without its last event")

    def _take_delta(self, delta: Delta) -> Delta:
        due = self._running(delta.choice)
        if delta.index != due:
            raise InternalError(f"the answer has token {delta.index} where token {due} was due")
        self._tokens[delta.choice] += len(delta.token_ids)
        return delta

    def _running(self, choice: int) -> int:
        """Tokens of a choice so far."""
        if choice not in self._tokens:
            raise InternalError(f"the answer goes on with choice {choice}, which has finished or was not asked for")
        return self._tokens[choice]
