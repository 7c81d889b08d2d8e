"""What is seen of one request: its metrics, the attributes of its span, and its line in the log.

The line has everything that there is to know of a request, for those who look for one and for those who count many, but
nothing that the client wrote. `docs/logging.md` lists its keys.
"""

from collections import Counter
from dataclasses import dataclass, field, fields

from opentelemetry.trace import Span

from zipserve.common import log, tracing
from zipserve.common.errors import DeadlineError, ZipserveError
from zipserve.common.metrics import Metrics
from zipserve.common.sampling import Sampling
from zipserve.router.caller import ANYBODY, Caller
from zipserve.router.choice import Choice, Report
from zipserve.router.job import Job
from zipserve.v1.sampling_pb2 import FinishReason

_log = log.get()
_USUAL = Sampling()


@dataclass
class Observation:
    """As far as a request has come. Times in seconds of one clock."""

    request_id: str
    model: str
    arrived_s: float
    caller: Caller = ANYBODY
    api: str = "grpc"
    """Through which it came: grpc or http."""
    guide: str = ""
    """Kind of the guide of its output; empty: none."""
    span: Span = field(default_factory=tracing.current)
    """Of the call; those of its parts are children of it."""
    admitted_s: float | None = None
    job: Job | None = None
    choices: list[Choice] = field(default_factory=list)
    first_token_s: float | None = None
    """When the first token came, of any choice."""
    error: ZipserveError | None = None
    complete: bool = False
    """Whether all choices have come to their end."""

    def admit(self, job: Job, now_s: float, metrics: Metrics) -> None:
        """It is valid, and there is room for it."""
        self.job, self.admitted_s = job, now_s
        metrics.prompt_tokens.inc(len(job.prompt))

    def note_token(self, now_s: float, metrics: Metrics) -> None:
        """A token came; the first one counts."""
        if self.first_token_s is None:
            self.first_token_s = now_s
            metrics.first_token_seconds.observe(now_s - self.arrived_s)

    def finish(self, now_s: float, metrics: Metrics) -> None:
        """It has ended, in whatever way."""
        self._count(now_s, metrics)
        values = self._values(now_s)
        if self.error is not None:
            tracing.fail(self.span, self.error)
        if self.span.is_recording():
            told = {key: value for key, value in values.items() if isinstance(value, str | int | float) and value != ""}
            self.span.set_attributes({f"zipserve.{key}": value for key, value in told.items()})
        _log.info("request.finished", **values)

    @property
    def outcome(self) -> str:
        """OK, CANCELLED, or the error's reason."""
        return "OK" if self.complete else self.error.reason if self.error else "CANCELLED"

    @property
    def _stage(self) -> str:
        if self.job is None:
            return "admission"
        if self.first_token_s is not None:
            return "decode"
        is_sent = any(choice.report.prefill_worker for choice in self.choices)
        return "prefill" if is_sent else "queue"

    def _count(self, now_s: float, metrics: Metrics) -> None:
        metrics.requests.labels(self.caller.name, self.outcome).inc()
        if self.complete:
            metrics.request_seconds.observe(now_s - self.arrived_s)
        if self.job is None and self.error is not None:
            metrics.rejections.labels(self.error.reason).inc()
        if isinstance(self.error, DeadlineError):
            metrics.deadline_misses.labels(self._stage).inc()
        for choice in self.choices:
            if choice.transcript.finish is not None:
                metrics.choices.labels(_name(choice.transcript.finish)).inc()
        if self.job is not None and self.choices:
            cached_tokens, generated_tokens = self.choices[0].report.cached_tokens, self._completion_tokens
            metrics.cached_prompt_tokens.inc(cached_tokens)
            metrics.generated_tokens.inc(generated_tokens)
            kinds = {"prompt": len(self.job.prompt), "cached": cached_tokens, "generated": generated_tokens}
            for kind, tokens in kinds.items():
                metrics.caller_tokens.labels(self.caller.name, kind).inc(tokens)

    @property
    def _completion_tokens(self) -> int:
        return sum(len(choice.transcript.token_ids) for choice in self.choices)

    def _values(self, now_s: float) -> dict[str, object]:
        values: dict[str, object] = {
            "request_id": self.request_id,
            "trace_id": tracing.trace_id(self.span),
            "api": self.api,
            "caller": self.caller.name,
            "model": self.model,
            "outcome": self.outcome,
            "reason": self._reason,
            "seconds": round(now_s - self.arrived_s, 4),
        }
        if self.job is not None:
            values |= self._of_job(self.job)
        if self.choices:
            values |= self._of_choices()
        return values

    @property
    def _reason(self) -> str:
        """Why it ended: how its choices did, or else the outcome."""
        if not self.complete:
            return self.outcome
        return "+".join(sorted({_name(choice.transcript.finish) for choice in self.choices}))

    def _of_job(self, job: Job) -> dict[str, object]:
        return {
            "admission_s": round((self.admitted_s or self.arrived_s) - self.arrived_s, 4),
            "prompt_tokens": len(job.prompt),
            "max_tokens": job.max_tokens,
            "priority": job.priority,
            "guide": self.guide,
            "sampling": _summary(job.sampling),
        }

    def _of_choices(self) -> dict[str, object]:
        report = self.choices[0].report
        reports = [choice.report for choice in self.choices]
        values: dict[str, object] = {
            "choices": len(self.choices),
            "completion_tokens": self._completion_tokens,
            "stop": "+".join(sorted({choice.transcript.stop_cause for choice in self.choices} - {""})),
            "cached_tokens": report.cached_tokens,
            "route_s": round(report.route_s, 4),
            "queue_s": round(report.queue_s, 4),
            "prefill_s": round(report.prefill_s, 4),
            "transfer_s": round(report.transfer_s, 4),
            "kv_bytes": report.kv_bytes,
            "kv_blocks": report.kv_blocks,
            "prefill_worker": report.prefill_worker,
            "decode_worker": report.decode_worker,
            "replays": sum(report.replays for report in reports),
            "replay_reasons": dict(sum((report.replay_reasons for report in reports), Counter[str]())),
        }
        if report.first_token_at_s is not None and report.last_token_at_s is not None:
            values["first_token_s"] = round(report.first_token_at_s - self.arrived_s, 4)
            values["decode_s"] = round(report.last_token_at_s - report.first_token_at_s, 4)
            values["itl_mean_s"] = round(_mean_gap_s(reports), 5)
            values["itl_max_s"] = round(max(report.gap_max_s for report in reports), 5)
        return values


def _mean_gap_s(reports: list[Report]) -> float:
    gaps = sum(report.gaps for report in reports)
    spans_s = ((report.last_token_at_s or 0.0) - (report.first_token_at_s or 0.0) for report in reports)
    return sum(spans_s) / gaps if gaps else 0.0


def _summary(sampling: Sampling) -> dict[str, object]:
    """What is not as usual; of the biases only how many."""
    values = {one.name: getattr(sampling, one.name) for one in fields(sampling)}
    told = {key: value for key, value in values.items() if value != getattr(_USUAL, key) or key == "seed"}
    return {**told, **({"logit_bias": len(sampling.logit_bias)} if sampling.logit_bias else {})}


def _name(reason: FinishReason.ValueType | None) -> str:
    return FinishReason.Name(reason or FinishReason.FINISH_REASON_UNSPECIFIED).removeprefix("FINISH_REASON_")
