"""Prometheus metrics: every one that a service of ours tells, with its name, labels and meaning, in one place.

`docs/metrics.md` is made of this (`zipserve.common.metrics_reference`). Names are stable. Labels have few values: of
what clients choose, none but the name of a configured key.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app, start_http_server
from prometheus_client.metrics import MetricWrapperBase

from zipserve.common.errors import BY_REASON, HandoffError, ZipserveError
from zipserve.common.quick_histogram import QuickHistogram
from zipserve.common.steps import StepLog

M = TypeVar("M", bound=MetricWrapperBase)

SERVICES = ("router", "prefill", "decode", "kvstore")
_ROUTER, _STORE = ("router",), ("kvstore",)
_COMPUTING = ("prefill", "decode")
_SERVING = ("router", *_COMPUTING)
_HOLDING = (*_COMPUTING, *_STORE)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_TOKEN_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
    10.0,
)  # fmt: skip
_TRANSFER_SECONDS = (0.0001, 0.00025, 0.0005, *_SECONDS[:-3])


@dataclass(frozen=True)
class Described:
    """A metric as its reference tells it."""

    name: str
    """As Prometheus sees it: of a counter with `_total`, of a histogram without `_bucket`, `_sum` and `_count`."""
    kind: str
    labels: tuple[str, ...]
    meaning: str
    services: tuple[str, ...]

    @property
    def unit(self) -> str:
        """What a value counts in; empty: things."""
        words = self.name.removesuffix("_total").split("_")
        return next((unit for unit in ("seconds", "bytes", "tokens") if words[-1] == unit), "")


class Metrics:
    """The metrics of a process, in a registry of their own, so that several services fit into one test process.

    Args:
        service: which one; what others tell can be set here all the same, but nobody sees it. Empty: all.
    """

    def __init__(self, service: str = "") -> None:
        self.registry = CollectorRegistry()
        self.described: list[Described] = []
        """All that the service tells."""
        self.steps = StepLog()
        """Of a worker: told one by one (`WorkerService.ListSteps`), not to Prometheus."""
        self._service = service
        self.build_info = self._gauge(
            "build_info", "1; the labels tell what runs here", SERVICES,
            ["service", "version", "model", "codec"],
        )  # fmt: skip
        self.rpcs = self._counter(
            "rpcs", "Calls answered, by method and reason (OK, or the error's)", SERVICES, ["method", "reason"]
        )
        self.rpc_seconds = self._histogram("rpc_seconds", "Time to answer a call", SERVICES, _SECONDS, ["method"])
        self._add_requests()
        self._add_steps()
        self._add_pools()
        self._add_transfers()
        self._add_prefixes()

    def serve(
        self,
        host: str,
        port: int | None,
        is_ready: Callable[[], bool] = lambda: True,
        lives: Callable[[], bool] = lambda: True,
    ) -> int | None:
        """Serves /metrics, /live and /health from a thread of the library's own, unless `port` is None, and returns its
        port: a free one where 0 was asked for."""
        if port is None:
            return None
        server, _ = start_http_server(port, addr=host.strip("[]"), registry=self.registry)
        server.set_app(_with_health(make_wsgi_app(self.registry), is_ready, lives))
        return int(server.server_port)

    def _add_requests(self) -> None:
        self.requests = self._counter(
            "requests", "Requests that have ended, by caller (name of its key, or empty) and reason: OK, CANCELLED, or "
            "the error's", _ROUTER, ["caller", "reason"],
        )  # fmt: skip
        self.choices = self._counter(
            "choices_finished", "Answers that were generated to their end, by reason", _ROUTER, ["reason"]
        )
        self.rejections = self._counter(
            "requests_rejected", "Requests that were not admitted, by the error's reason", _ROUTER, ["reason"]
        )
        self.deadline_misses = self._counter(
            "deadline_misses", "Requests whose deadline passed, by how far they had come: admission, queue, prefill or "
            "decode", _ROUTER, ["stage"],
        )  # fmt: skip
        self.request_seconds = self._histogram(
            "request_seconds", "Arrival to last event of requests that were answered", _ROUTER, _REQUEST_SECONDS
        )
        self.first_token_seconds = self._histogram(
            "first_token_seconds", "Arrival to first token (TTFT), at the router", _ROUTER, _SECONDS
        )
        meaning = "Time between two tokens of an answer (ITL), as they come to the router; replays and parking included"
        registry = self._describe("histogram", "zipserve_inter_token_seconds", meaning, _ROUTER, ())
        self.inter_token_seconds = QuickHistogram("zipserve_inter_token_seconds", meaning, _TOKEN_SECONDS, registry)
        self.replays = self._counter(
            "replays", "Attempts that failed and were replayed, by reason", _ROUTER, ["reason"]
        )
        _start(self.replays, (error for error in BY_REASON.values() if error.replayable))
        self.caller_tokens = self._counter(
            "caller_tokens", "Tokens by caller (name of its key, or empty) and kind: prompt, cached or generated",
            _ROUTER, ["caller", "kind"],
        )  # fmt: skip
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts", _SERVING)
        self.cached_prompt_tokens = self._counter(
            "cached_prompt_tokens", "Tokens of prompts that were not computed because their KV was there", _SERVING
        )
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated", ("router", "decode"))
        self.queue_seconds = self._histogram(
            "queue_seconds", "Wait of a request before its work began: on a router for workers that can serve it, on a "
            "worker for its turn, slot and slabs", _SERVING, _SECONDS,
        )  # fmt: skip
        self.queued_requests = self._gauge("queued_requests", "Requests waiting", _SERVING)
        self.running_requests = self._gauge("running_requests", "Requests being computed", _SERVING)

    def _add_steps(self) -> None:
        self.step_seconds = self._histogram("step_seconds", "Time of one forward pass", _COMPUTING, _SECONDS)
        self.prompt_seconds = self._histogram(
            "prompt_seconds", "Time of a prompt from its first step to its first token, seals included", _COMPUTING,
            _SECONDS,
        )  # fmt: skip
        self.queued_tokens = self._gauge("queued_tokens", "Tokens of the requests waiting", _COMPUTING)
        self.parked_requests = self._gauge(
            "parked_requests", "Sequences whose KV is in host memory until there is room", ("decode",)
        )
        self.parked_bytes = self._gauge("parked_bytes", "Host memory of parked sequences", ("decode",))
        self.parkings = self._counter("parkings", "Sequences that had to make room", ("decode",))

    def _add_pools(self) -> None:
        pool = ["arena", "codec", "precision"]
        self.slabs = self._gauge(
            "kv_slabs", "Slabs of an arena (block, tail, sinks) by state: used; idle, which later prompts find and "
            "which are given up when somebody needs room; or free", _HOLDING, [*pool, "state"],
        )  # fmt: skip
        self.arena_bytes = self._gauge("kv_arena_bytes", "Memory of an arena", _HOLDING, pool)
        self.bits_per_value = self._gauge(
            "kv_bits_per_value", "All-in bits of a K or V element in a sealed block: codes, parameters, maps, header",
            _HOLDING, pool[1:],
        )  # fmt: skip
        self.free_blocks = self._gauge(
            "kv_blocks_free", "Slabs of the block arena that a request can have: free and idle ones", _HOLDING
        )
        self.cached_blocks = self._gauge(
            "kv_blocks_cached", "Blocks that prompts with the same prefix find, in use or not", _HOLDING
        )
        self.disk_blocks = self._gauge("kv_disk_blocks", "Blocks on disk", _STORE)
        self.promoted_blocks = self._counter(
            "kv_blocks_promoted", "Blocks that were brought from disk into memory", _STORE
        )

    def _add_transfers(self) -> None:
        self.handoff_failures = self._counter(
            "kv_handoff_failures", "KV that was refused, by the error's reason: BLOCK_CORRUPT is a wrong checksum, "
            "TRANSFER_FAILED a lost peer", _HOLDING, ["reason"],
        )  # fmt: skip
        _start(self.handoff_failures, (error for error in BY_REASON.values() if issubclass(error, HandoffError)))
        self.transfer_bytes = self._counter(
            "kv_transfer_bytes", "Bytes read over NIXL, by the role of the peer that they came from", _HOLDING,
            ["source"],
        )  # fmt: skip
        self.transfer_seconds = self._histogram(
            "kv_transfer_seconds", "Time of one read over NIXL, by the role of the peer", _HOLDING, _TRANSFER_SECONDS,
            ["source"],
        )  # fmt: skip
        self.verify_seconds = self._histogram(
            "kv_verify_seconds", "Time to check what one read has brought", _HOLDING, _TRANSFER_SECONDS
        )
        self.leases_expired = self._counter("kv_leases_expired", "Leases that ended without a release", _HOLDING)
        self.leases = self._gauge("kv_leases", "Leases that readers hold", _HOLDING)

    def _add_prefixes(self) -> None:
        self.prefix_blocks = self._counter(
            "kv_prefix_blocks", "Full blocks of prompts that were looked for, by outcome: hit or miss", ("prefill",),
            ["outcome"],
        )  # fmt: skip
        self.prefix_evictions = self._counter(
            "kv_prefix_evictions", "Cached blocks that can be found no more, most to make room for others", _HOLDING
        )
        self.prefix_fetches = self._counter(
            "kv_prefix_fetches", "Fetches of blocks that others hold, by outcome: fetched, missed or failed", _HOLDING,
            ["outcome"],
        )  # fmt: skip
        self.prefix_blocks_fetched = self._counter("kv_prefix_blocks_fetched", "Blocks fetched from others", _HOLDING)

    def _counter(self, name: str, meaning: str, services: Sequence[str], labels: Sequence[str] = ()) -> Counter:
        return self._add(Counter, f"{name}_total", meaning, services, labels)

    def _gauge(self, name: str, meaning: str, services: Sequence[str], labels: Sequence[str] = ()) -> Gauge:
        return self._add(Gauge, name, meaning, services, labels)

    def _histogram(
        self, name: str, meaning: str, services: Sequence[str], buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        return self._add(Histogram, name, meaning, services, labels, buckets=buckets)

    def _add(
        self, kind: type[M], name: str, meaning: str, services: Sequence[str], labels: Sequence[str], **options: Any
    ) -> M:
        name = f"zipserve_{name}"
        registry = self._describe(kind.__name__.lower(), name, meaning, services, labels)
        return kind(name, meaning, labels, registry=registry, **options)

    def _describe(
        self, kind: str, name: str, meaning: str, services: Sequence[str], labels: Sequence[str]
    ) -> CollectorRegistry | None:
        """The registry for a metric; None where the service does not tell it."""
        if self._service not in ("", *services):
            return None
        self.described.append(Described(name, kind, tuple(labels), meaning, tuple(services)))
        return self.registry


def _start(counter: Counter, errors: Iterable[type[ZipserveError]]) -> None:
    """Tells a counter by reason as 0 from the start: Prometheus sees no increase in a series that begins at 1."""
    for error in errors:
        counter.labels(error.reason)


def _with_health(metrics: WSGIApplication, is_ready: Callable[[], bool], lives: Callable[[], bool]) -> WSGIApplication:
    """Beside metrics the pages for a kubelet, which has neither token nor certificate: /live is 503 when the service
    answers no more, /health also while it takes no new work."""
    checks: dict[str, Callable[[], bool]] = {"/live": lives, "/health": lambda: is_ready() and lives()}

    def page(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        check = checks.get(environ["PATH_INFO"])
        if check is None:
            return metrics(environ, start_response)
        well = check()
        start_response("200 OK" if well else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if well else b"takes no new work\n"]

    return page
