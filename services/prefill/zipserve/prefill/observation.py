"""What is seen of one prompt on its way through the worker: its metrics, spans and line in the log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from zipserve.common import log, tracing
from zipserve.common.errors import ZipserveError
from zipserve.common.metrics import Metrics
from zipserve.prefill.prompt import Prompt

_log = log.get()


@contextmanager
def observed(prompt: Prompt, metrics: Metrics) -> Iterator[None]:
    """While the context is open, a prompt waits and is computed; however it ends, that is told."""
    outcome = "CANCELLED"
    try:
        yield
        outcome = "OK"
    except ZipserveError as error:
        outcome = error.reason
        raise
    finally:
        _tell(prompt, metrics, outcome, time.monotonic())


def _tell(prompt: Prompt, metrics: Metrics, outcome: str, now_s: float) -> None:
    started_s = prompt.started_s or now_s
    queue_s, compute_s = started_s - prompt.submitted_s, now_s - started_s
    cached_tokens = prompt.result.result().cached_tokens if outcome == "OK" else 0
    metrics.queue_seconds.observe(queue_s)
    if outcome == "OK":
        metrics.prompt_seconds.observe(compute_s)
        metrics.cached_prompt_tokens.inc(cached_tokens)
    told = {
        "tokens": len(prompt.token_ids),
        "cached_tokens": cached_tokens,
        "choices": len(prompt.samplers),
        "steps": prompt.steps,
    }
    tracing.record("queue", prompt.submitted_s, started_s)
    if prompt.started_s:
        computing = tracing.record("compute", started_s, now_s)
        if prompt.seal_s[0]:
            tracing.record("seal", *prompt.seal_s, computing)
    span = tracing.current()
    if span.is_recording():
        span.set_attributes({f"zipserve.{key}": value for key, value in told.items()})
    _log.info(
        "prompt.finished",
        request_id=prompt.request_id,
        outcome=outcome,
        **told,
        queue_s=round(queue_s, 4),
        compute_s=round(compute_s, 4),
    )
