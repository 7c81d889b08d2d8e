"""What a client saw of one answer, and how it is told. Pure: times are handed in."""

from dataclasses import dataclass, field
from typing import Any

from google.protobuf.duration_pb2 import Duration

from zipserve.client import Event
from zipserve.v1.inference_service_pb2 import Delta, Finished, PromptLogprobs, Started
from zipserve.v1.sampling_pb2 import FinishReason, TokenLogprobs


@dataclass
class Answer:
    """Gathers the events of one answer. All times are of one clock, in seconds."""

    asked_at_s: float
    choice: int = 0
    """Which of several answers to the prompt."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    started: Started = field(default_factory=Started)
    finished: Finished | None = None
    first_at_s: float | None = None
    """When the first token came."""
    first_tokens: int = 0
    """Tokens that came with it."""
    last_at_s: float = 0.0
    """When the newest token came."""

    def add(self, event: Event, now_s: float) -> str:
        """Takes in an event, if it is of this answer's choice; returns its text."""
        if isinstance(event, Delta | Finished) and event.choice != self.choice:
            return ""
        match event:
            case Started():
                self.started = event
            case Finished():
                self.finished = event
            case PromptLogprobs():
                self.prompt_logprobs.extend(event.logprobs)
            case Delta():
                self.logprobs.extend(event.logprobs)
                self.text += event.text
                if event.token_ids:
                    self.token_ids.extend(event.token_ids)
                    self.last_at_s = now_s
                    if self.first_at_s is None:
                        self.first_at_s, self.first_tokens = now_s, len(event.token_ids)
                return event.text
        return ""

    @property
    def ttft_s(self) -> float | None:
        """Time from asking to the first token, as the client saw it."""
        return None if self.first_at_s is None else self.first_at_s - self.asked_at_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two arrivals."""
        later = len(self.token_ids) - self.first_tokens
        if self.first_at_s is None or later < 1:
            return None
        return (self.last_at_s - self.first_at_s) / later

    @property
    def finish_reason(self) -> str:
        """ "stop" or "length"; empty while unfinished."""
        if self.finished is None:
            return ""
        return FinishReason.Name(self.finished.reason).removeprefix("FINISH_REASON_").lower()

    def statistics(self) -> list[str]:
        """Measurements for people, a line each."""
        if self.finished is None:
            return ["the answer was not finished"]
        usage, times, moved = self.finished.usage, self.finished.timings, self.finished.kv_transfer
        tokens = f"{usage.prompt_tokens} prompt + {usage.completion_tokens} completion tokens ({self.finish_reason})"
        if usage.replays:
            tokens += f", replayed {usage.replays} times"
        transfer = f"{moved.tokens} tokens, pulled and verified in {_ms(_s(times.transfer))}"
        kv = f"KV over NIXL: {moved.bytes} bytes ({_size(moved.bytes)}), {moved.blocks} blocks, {transfer}"
        return [
            f"TTFT {_ms(self.ttft_s)}, TPOT {_ms(self.tpot_s)}{_rate(self.tpot_s)}, {tokens}",
            f"prefill {_ms(_s(times.prefill))}, {_ms(_s(times.queue))} in its queue, decode {_ms(_s(times.decode))}",
            kv if moved.bytes else "KV over NIXL: none, the prompt was computed where it is continued",
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        finished = self.finished or Finished()
        usage, times, moved = finished.usage, finished.timings, finished.kv_transfer
        return {
            "request_id": self.started.request_id,
            "model": self.started.model,
            "choice": self.choice,
            "seed": self.started.seed,
            "text": self.text,
            "token_ids": self.token_ids,
            "logprobs": [_logprobs(of_token) for of_token in self.logprobs],
            "prompt_logprobs": [_logprobs(of_token) for of_token in self.prompt_logprobs],
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "replays": usage.replays,
            },
            "client": {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s},
            "server": {
                "queue_s": _s(times.queue),
                "prefill_s": _s(times.prefill),
                "transfer_s": _s(times.transfer),
                "first_token_s": _s(times.first_token),
                "decode_s": _s(times.decode),
            },
            "kv_transfer": {"bytes": moved.bytes, "blocks": moved.blocks, "tokens": moved.tokens},
        }


def _logprobs(of_token: TokenLogprobs) -> dict[str, Any]:
    top = zip(of_token.top_token_ids, of_token.top_logprobs, strict=True)
    return {"logprob": of_token.logprob, "top": [{"token_id": token_id, "logprob": value} for token_id, value in top]}


def _s(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.1f} ms"


def _rate(tpot_s: float | None) -> str:
    return f" ({1 / tpot_s:.1f} tokens/s)" if tpot_s else ""


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
