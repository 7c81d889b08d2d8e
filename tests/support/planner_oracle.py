"""The planner's chain once more, written to be read: a heap of events, plain lists, one worker per stage."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from zipserve.planner.chain import StepTime


@dataclass
class Request:
    number: int
    arrival_ms: float
    prompt: int
    output: int
    decoded: int = 0
    first_ms: float = float("nan")
    done_ms: float = float("nan")

    @property
    def tokens(self) -> int:
        """Of its context, with the one to come."""
        return self.prompt + self.decoded + 1


@dataclass
class Stage:
    prompts: list[list[Request]] = field(default_factory=list)
    """Batches that wait; in the first stage of one request each, from which it forms its own."""
    sequences: list[Request] = field(default_factory=list)
    busy: bool = False


class Oracle:
    """Runs one chain; afterwards `requests` have their times, and `steps` says what every decode step held."""

    def __init__(self, requests: Sequence[Request], step: StepTime, *, prefills: bool, decodes: bool) -> None:
        self.requests = requests
        self.step = step
        self.prefills, self.decodes = prefills, decodes
        self.stages = [Stage() for _ in range(step.stages)]
        self.events: list[tuple[float, int, str, int, list[Request]]] = []
        self.steps: list[tuple[int, int]] = []
        for request in requests:
            # arrivals come before everything else at their instant
            heapq.heappush(self.events, (request.arrival_ms, request.number - len(requests), "arrive", 0, [request]))
        self.turn = 0

    def run(self) -> None:
        while self.events:
            now_ms, _, what, stage, batch = heapq.heappop(self.events)
            if what == "arrive":
                self._enter(batch[0], now_ms)
                continue
            if what == "prefilled":
                self._prefilled(stage, batch, now_ms)
            elif what == "decoded":
                self._decoded(stage, batch, now_ms)
            self._take(stage, now_ms)

    def _enter(self, request: Request, now_ms: float) -> None:
        if self.prefills:
            self.stages[0].prompts.append([request])
        else:
            request.first_ms = now_ms
            self.stages[0].sequences.append(request)
        self._wake(0, now_ms)

    def _schedule(self, at_ms: float, what: str, stage: int, batch: list[Request]) -> None:
        heapq.heappush(self.events, (at_ms, self.turn, what, stage, batch))
        self.turn += 1

    def _wake(self, stage: int, now_ms: float) -> None:
        if not self.stages[stage].busy:
            self.stages[stage].busy = True
            self._schedule(now_ms, "resume", stage, [])

    def _prefilled(self, stage: int, batch: list[Request], now_ms: float) -> None:
        if stage + 1 < len(self.stages):
            self.stages[stage + 1].prompts.append(batch)
            self._wake(stage + 1, now_ms)
            return
        for request in batch:
            request.first_ms = now_ms
        if self.decodes:
            self.stages[0].sequences += batch
            self._wake(0, now_ms)

    def _decoded(self, stage: int, batch: list[Request], now_ms: float) -> None:
        following = (stage + 1) % len(self.stages)
        if following == 0:
            for request in batch:
                request.decoded += 1
                if request.decoded == request.output:
                    request.done_ms = now_ms
            batch = [request for request in batch if request.decoded < request.output]
        self.stages[following].sequences += batch
        if self.stages[following].sequences or following:
            self._wake(following, now_ms)

    def _take(self, stage: int, now_ms: float) -> None:
        here = self.stages[stage]
        here.busy = True
        if here.prompts:
            batch = self._prompts(stage)
            self._schedule(now_ms + self._prefill_ms(stage, batch), "prefilled", stage, batch)
        elif here.sequences:
            batch, total = [], 0
            while here.sequences and total + here.sequences[0].tokens <= self.step.decode_tokens_max:
                total += here.sequences[0].tokens
                batch.append(here.sequences.pop(0))
            self.steps.append((len(batch), total))
            self._schedule(now_ms + self._decode_ms(stage, len(batch), total), "decoded", stage, batch)
        else:
            here.busy = False

    def _prompts(self, stage: int) -> list[Request]:
        waiting = self.stages[stage].prompts
        if stage:
            return waiting.pop(0)
        batch: list[Request] = []
        while waiting and sum(r.prompt for r in batch) + waiting[0][0].prompt <= self.step.prefill_tokens_max:
            batch += waiting.pop(0)
        return batch

    def _prefill_ms(self, stage: int, batch: list[Request]) -> float:
        tokens, squares = sum(r.prompt for r in batch), sum(r.prompt**2 for r in batch)
        constant, per_token, per_square = self.step.prefill
        took_ms = (constant + per_token * tokens + per_square * squares) / self.step.stages + self.step.prefill_hop
        return took_ms + self._first_ms(stage, tokens)

    def _decode_ms(self, stage: int, count: int, total: int) -> float:
        constant, per_token, per_sequence = (
            self.step.decode_small if count < self.step.large_from else self.step.decode_large
        )
        took_ms = (constant + per_token * total + per_sequence * count) / self.step.stages
        return took_ms + self._first_ms(stage, total - count)

    def _first_ms(self, stage: int, context: int) -> float:
        return 0.0 if stage else self.step.first_stage[0] + self.step.first_stage[1] * context
