"""One of the answers to a prompt: what is to be generated, what has been, and what that took."""

from collections import Counter
from dataclasses import dataclass, field, replace

from zipserve.common.rpc.duration import to_seconds
from zipserve.router.job import Job
from zipserve.router.transcript import Transcript
from zipserve.v1.decode_service_pb2 import Computed, Pulled
from zipserve.v1.prefill_service_pb2 import PrefillResponse


@dataclass
class Report:
    """What a choice took, over all attempts; what choices share counts for each. Times in seconds."""

    replays: int = 0
    replay_reasons: Counter[str] = field(default_factory=Counter)
    route_s: float = 0.0
    """Waiting for workers that can serve it."""
    queue_s: float = 0.0
    """In the queues of workers."""
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    first_token_at_s: float | None = None
    last_token_at_s: float | None = None
    gaps: int = 0
    """Between two of its tokens."""
    gap_max_s: float = 0.0
    cached_tokens: int = 0
    """Of the prompt, in the last prefill."""
    kv_bytes: int = 0
    kv_blocks: int = 0
    kv_tokens: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""

    def count_tokens(self, tokens: int, now_s: float) -> float | None:
        """Adds tokens that came together, and returns the time since those before; None: they are the first."""
        before_s, self.last_token_at_s = self.last_token_at_s, now_s
        if before_s is None:
            self.first_token_at_s = now_s
            self.gaps += tokens - 1
            return None
        self.gaps += tokens
        self.gap_max_s = max(self.gap_max_s, now_s - before_s)
        return now_s - before_s

    def count_prefill(self, answer: PrefillResponse, prompt_tokens: int) -> None:
        """Adds what a prefill took, of a sequence that began with so many tokens of the prompt."""
        self.cached_tokens = min(answer.cached_tokens, prompt_tokens)
        self.queue_s += to_seconds(answer.queue_time)
        self.prefill_s += to_seconds(answer.compute_time)

    def count_computed(self, computed: Computed, prompt_tokens: int) -> None:
        """Adds what computing a sequence on a decode worker took, which began with so many tokens of the prompt."""
        self.cached_tokens = min(computed.cached_tokens, prompt_tokens)
        self.queue_s += to_seconds(computed.queue_time)
        self.prefill_s += to_seconds(computed.compute_time)

    def count_pull(self, pulled: Pulled, tokens: int) -> None:
        """Adds what moved to a decode worker."""
        self.queue_s += to_seconds(pulled.queue_time)
        self.transfer_s += to_seconds(pulled.transfer_time) + to_seconds(pulled.verify_time)
        self.kv_bytes += pulled.bytes
        self.kv_blocks += pulled.blocks
        self.kv_tokens += tokens


@dataclass(eq=False)
class Choice:
    """One answer."""

    job: Job
    """Of its own index and seed."""
    transcript: Transcript
    report: Report = field(default_factory=Report)


def job_of(job: Job, choice: int) -> Job:
    """The job of the choice of an index, from that of the first."""
    return replace(job, choice=choice, sampling=job.sampling.of_choice(choice))
