"""Our own cluster: workers of both roles, the links between them, and the router. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.machines import Machines, lay_out
from zipserve.planner.native.profile import Link
from zipserve.planner.native.traffic import extras
from zipserve.planner.native.workers import DecodeWorker, PrefillWorker, Router, check_limit, check_worker
from zipserve.planner.workload import Workload


@dataclass(frozen=True, eq=False)
class Cluster:
    """Workers of each role, which may differ, and what lies between them.

    Raises:
        InvalidRequestError: it could not serve anything; the message names the limit and the value.
    """

    prefills: Sequence[PrefillWorker]
    decodes: Sequence[DecodeWorker]
    links: Sequence[Link] = ()
    wires: Sequence[Sequence[int]] | None = None
    """By prefill and decode worker: the number of the link between them. None: each decode worker has its own link,
    whoever it reads from, in the order of the workers; or, if there is only one link, all share it."""
    router: Router = field(default_factory=Router)

    def __post_init__(self) -> None:
        if not self.decodes:
            raise InvalidRequestError("a cluster without decode workers serves nothing", field="decodes")
        for i, prefill in enumerate(self.prefills):
            check_worker(f"prefill worker {i}", prefill)
        for i, decode in enumerate(self.decodes):
            check_worker(f"decode worker {i}", decode)
            check_limit(f"decode worker {i}", "slowdown_max", decode.slowdown_max, above=1.0)
            check_limit(f"decode worker {i}", "free_ms", decode.free_ms, least=0.0)
        for i, link in enumerate(self.links):
            check_limit(f"link {i}", "bytes_per_s", link.bytes_per_s, above=0.0)
            check_limit(f"link {i}", "fixed_ms", link.fixed_ms, least=0.0)
        check_limit("the router", "requests_max", self.router.requests_max, least=1)
        self._check_wires()
        self._check_layouts()

    @cached_property
    def wiring(self) -> tuple[tuple[int, ...], ...]:
        """By prefill and decode worker: the number of the link between them."""
        if self.wires is not None:
            return tuple(tuple(row) for row in self.wires)
        row = tuple(range(len(self.decodes))) if len(self.links) > 1 else (0,) * len(self.decodes)
        return (row,) * len(self.prefills)

    @cached_property
    def machines(self) -> Machines:
        """As the compiled run reads it."""
        return lay_out(self.prefills, self.decodes, self.links, self.wiring, self.router)

    def refusal(self, workload: Workload) -> str:
        """Why some request of a workload can never be served, whatever the rate; empty if all can."""
        prompts, totals, router = workload.prompts, workload.prompts + workload.outputs, self.router
        most = int(totals.max())
        if most + 1 > router.tokens_max:
            return f"a request of {most + 1} tokens, the router admits at most {router.tokens_max}"
        longest = int(prompts.max())
        if not router.is_local(longest) and not self.prefills:
            return (
                f"a prompt of {longest} tokens needs a prefill worker, and there is none: decode workers compute those "
                f"of at most {router.local_tokens_max}"
            )
        for i, prefill in enumerate(() if router.is_local(longest) else self.prefills):
            needed = longest // prefill.kv.block_tokens
            if needed > prefill.blocks:
                return f"a prompt of {longest} tokens needs {needed} KV blocks, prefill worker {i} has {prefill.blocks}"
        for i, decode in enumerate(self.decodes):
            needed = most // decode.kv.block_tokens
            if needed > decode.blocks:
                return f"a sequence of {most} tokens needs {needed} KV blocks, decode worker {i} has {decode.blocks}"
        return extras(workload).refusal(max(worker.kv.block_tokens for worker in self.decodes))

    def _check_wires(self) -> None:
        shape = len(self.prefills), len(self.decodes)
        if not self.prefills:
            return
        if not self.links:
            raise InvalidRequestError("prefill workers hand KV over, and there is no link", field="links")
        if self.wires is None and len(self.links) not in (1, len(self.decodes)):
            raise InvalidRequestError(
                f"{len(self.links)} links for {len(self.decodes)} decode workers: wires must say which is whose",
                field="wires",
            )
        if len(self.wiring) != shape[0] or any(len(row) != shape[1] for row in self.wiring):
            raise InvalidRequestError(
                f"wires must be {shape[0]} rows of {shape[1]}, one for each pair of workers", field="wires"
            )
        for number in (number for row in self.wiring for number in row):
            if not 0 <= number < len(self.links):
                raise InvalidRequestError(f"wires name link {number} of {len(self.links)}", field="wires")

    def _check_layouts(self) -> None:
        read = {worker.kv.layout: worker.kv for worker in self.decodes}
        for i, worker in enumerate(self.prefills):
            known = read.get(worker.kv.layout)
            if known is None:
                raise InvalidRequestError(
                    f"no decode worker reads layout {worker.kv.layout!r} of prefill worker {i}, they read "
                    f"{', '.join(map(repr, sorted(read)))}",
                    field="layout",
                )
        for kv in [*(worker.kv for worker in self.prefills), *(worker.kv for worker in self.decodes)]:
            if kv != read[kv.layout]:
                raise InvalidRequestError(f"layout {kv.layout!r} is both {kv} and {read[kv.layout]}", field="layout")
