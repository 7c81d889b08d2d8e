"""Runs a workload through a deployment of one instance per role, or of one that does both. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zipserve.common.errors import InvalidRequestError
from zipserve.planner import chain
from zipserve.planner.chain import Floats, Goal
from zipserve.planner.goal import Slo, unlimited
from zipserve.planner.latency import Instance
from zipserve.planner.workload import Workload


@dataclass(frozen=True)
class Placement:
    """Where a model runs: a prefill and a decode instance, or one that does both."""

    prefill: Instance | None
    decode: Instance | None
    both: Instance | None = None
    segments: int = 1
    """Nodes that each instance is cut into, each with a segment of both; 1: no cut."""

    @property
    def instances(self) -> tuple[Instance, ...]:
        """All of them."""
        return tuple(instance for instance in (self.prefill, self.decode, self.both) if instance is not None)

    @property
    def devices(self) -> int:
        """How many it occupies."""
        return sum(instance.devices for instance in self.instances)

    @property
    def shape(self) -> tuple[int, ...]:
        """The published notation: pipeline across nodes, tensor and pipeline of prefill, then of decode; or tensor and
        pipeline."""
        if self.both is not None:
            return self.both.tensor, self.both.pipeline
        parts = [
            number
            for instance in (self.prefill, self.decode)
            if instance is not None
            for number in (instance.tensor, instance.pipeline // self.segments)
        ]
        return self.segments, *parts


@dataclass(frozen=True, eq=False)
class Outcome:
    """Times of each request in ms; infinite where its run was given up."""

    ttft_ms: Floats
    tpot_ms: Floats


def simulate(placement: Placement, workload: Workload, rate: float) -> Outcome:
    """All times of a workload at `rate` requests per second.

    A placement without prefill has its requests arrive with their first token, one without decode has them leave with
    it: what the missing phase would add is 0.

    Raises:
        InvalidRequestError: a request can never be served, see `refusal`.
    """
    if why := refusal(placement, workload):
        raise InvalidRequestError(why, field="trace")
    return _run(placement, workload, rate, unlimited(len(workload)))[0]


def simulate_copies(
    prefill: Instance, prefills: int, decode: Instance, decodes: int, workload: Workload, rate: float
) -> Outcome:
    """All times when copies of a prefill instance take turns, and those of a decode instance after them.

    Args:
        rate: requests per second of all together.

    Raises:
        InvalidRequestError: a request can never be served, see `refusal`.
    """
    if why := refusal(Placement(prefill, decode), workload):
        raise InvalidRequestError(why, field="trace")
    arrivals_ms = workload.arrivals_ms(rate)
    first_ms, done_ms = np.empty_like(arrivals_ms), np.empty_like(arrivals_ms)
    in_time = np.zeros(len(workload), np.bool_)
    goal = unlimited(len(workload))
    for copy in range(prefills):
        own = slice(copy, None, prefills)
        lengths = workload.prompts[own].copy(), workload.outputs[own].copy()
        first_ms[own] = chain.run(
            arrivals_ms[own].copy(), *lengths, in_time[own].copy(), prefill.step, True, False, goal
        )[0]
    order = np.argsort(first_ms, kind="stable")
    for copy in range(decodes):
        of = order[copy::decodes]
        lengths = workload.prompts[of], workload.outputs[of]
        done_ms[of] = chain.run(first_ms[of], *lengths, in_time[of], decode.step, False, True, goal)[1]
    return _outcome(arrivals_ms, first_ms, done_ms, workload)


def passes(placement: Placement, workload: Workload, rate: float, slo: Slo) -> bool:
    """Whether a placement keeps its objectives at `rate` requests per second; gives up as soon as it cannot."""
    outcome, complete = _run(placement, workload, rate, slo.goal(len(workload)))
    return complete and slo.kept(outcome.ttft_ms, outcome.tpot_ms)


def refusal(placement: Placement, workload: Workload) -> str:
    """Why a placement cannot serve the workload at any rate; empty if it can."""
    for instance in placement.instances:
        shape = f"tensor {instance.tensor} × pipeline {instance.pipeline}"
        step = instance.step
        if instance is not placement.decode:
            longest = int(workload.prompts.max())
            if longest > step.prefill_tokens_max:
                return f"a prompt has {longest} tokens, {shape} holds {step.prefill_tokens_max}"
            work = step.prefill[1] * workload.prompts + step.prefill[2] * workload.prompts.astype(np.float64) ** 2
            if work.min() < 0:
                tokens = int(workload.prompts[work.argmin()])
                return f"the profile gives a prompt of {tokens} tokens {work.min():.3g} ms beyond the constant"
        if instance is not placement.prefill:
            longest = int((workload.prompts + workload.outputs).max())
            if longest > step.decode_tokens_max:
                return f"a sequence grows to {longest} tokens, {shape} decodes {step.decode_tokens_max}"
    return ""


def _run(placement: Placement, workload: Workload, rate: float, goal: Goal) -> tuple[Outcome, bool]:
    arrivals_ms = workload.arrivals_ms(rate)
    lengths = workload.prompts, workload.outputs
    late: NDArray[np.bool_] = np.zeros(len(workload), np.bool_)
    complete = True
    if placement.both is not None:
        first_ms, done_ms, complete = chain.run(arrivals_ms, *lengths, late, placement.both.step, True, True, goal)
        return _outcome(arrivals_ms, first_ms, done_ms, workload), complete
    first_ms = arrivals_ms
    if placement.prefill is not None:
        first_ms, _, complete = chain.run(arrivals_ms, *lengths, late, placement.prefill.step, True, False, goal)
    done_ms = first_ms
    if complete and placement.decode is not None:
        late = first_ms - arrivals_ms >= goal.first_token_ms
        first_ms, done_ms, complete = chain.run(first_ms, *lengths, late, placement.decode.step, False, True, goal)
    return _outcome(arrivals_ms, first_ms, done_ms, workload), complete


def _outcome(arrivals_ms: Floats, first_ms: Floats, done_ms: Floats, workload: Workload) -> Outcome:
    return Outcome(first_ms - arrivals_ms, (done_ms - first_ms) / workload.outputs)
