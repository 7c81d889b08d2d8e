"""Prometheus metrics. One `Metrics` object per service process; names are `zipserve_*` and documented here."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """All metrics of a process, in a registry of their own, so that several services fit into one test process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.rpcs = Counter(
            "zipserve_rpcs", "Calls answered, by method and reason (OK, or the error's)", ["method", "reason"],
            registry=self.registry,
        )  # fmt: skip
        self.rpc_seconds = Histogram(
            "zipserve_rpc_seconds", "Time to answer a call", ["method"], buckets=_SECONDS, registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "zipserve_first_token_seconds", "Arrival to first token, at the router", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.replays = Counter(
            "zipserve_replays", "Attempts that failed and were replayed, by reason", ["reason"], registry=self.registry
        )
        self.prompt_tokens = Counter("zipserve_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.generated_tokens = Counter("zipserve_generated_tokens", "Tokens generated", registry=self.registry)
        self.handoff_failures = Counter(
            "zipserve_kv_handoff_failures", "KV handoffs refused, by reason", ["reason"], registry=self.registry
        )
        self.transfer_bytes = Counter("zipserve_kv_transfer_bytes", "Bytes read over NIXL", registry=self.registry)
        self.transfer_seconds = Histogram(
            "zipserve_kv_transfer_seconds", "Time of one read over NIXL", buckets=_SECONDS, registry=self.registry
        )
        self.leases_expired = Counter(
            "zipserve_kv_leases_expired", "Leases that ended without a release", registry=self.registry
        )
        self.leases = Gauge("zipserve_kv_leases", "Leases that readers hold", registry=self.registry)
        self.bits_per_value = Gauge(
            "zipserve_kv_bits_per_value", "All-in bits of a K or V element in a sealed block", registry=self.registry
        )
        self.free_blocks = Gauge("zipserve_kv_blocks_free", "Slabs of the block arena free", registry=self.registry)
        self.cached_blocks = Gauge(
            "zipserve_kv_blocks_cached", "Blocks that prompts with the same prefix find, in use or not",
            registry=self.registry,
        )  # fmt: skip
        self.prefix_blocks = Counter(
            "zipserve_kv_prefix_blocks", "Full blocks of prompts that were looked for, by outcome: hit or miss",
            ["outcome"], registry=self.registry,
        )  # fmt: skip
        self.prefix_evictions = Counter(
            "zipserve_kv_prefix_evictions", "Cached blocks that can be found no more, most to make room for others",
            registry=self.registry,
        )  # fmt: skip
        self.prefix_fetches = Counter(
            "zipserve_kv_prefix_fetches", "Fetches of blocks that others hold, by outcome: fetched, missed or failed",
            ["outcome"], registry=self.registry,
        )  # fmt: skip
        self.prefix_blocks_fetched = Counter(
            "zipserve_kv_prefix_blocks_fetched", "Blocks fetched from others", registry=self.registry
        )
        self.promoted_blocks = Counter(
            "zipserve_kv_blocks_promoted", "Blocks that were brought from disk into memory", registry=self.registry
        )
        self.queued_requests = Gauge("zipserve_queued_requests", "Requests waiting", registry=self.registry)
        self.running_requests = Gauge("zipserve_running_requests", "Requests being computed", registry=self.registry)
        self.parked_requests = Gauge(
            "zipserve_parked_requests", "Sequences whose KV is in host memory", registry=self.registry
        )
        self.parked_bytes = Gauge("zipserve_parked_bytes", "Host memory of parked sequences", registry=self.registry)
        self.parkings = Counter("zipserve_parkings", "Sequences that had to make room", registry=self.registry)
        self.step_seconds = Histogram(
            "zipserve_step_seconds", "Time of one forward pass", buckets=_SECONDS, registry=self.registry
        )

    def serve(self, host: str, port: int) -> None:
        """Serves /metrics from a thread of the library's own, when `port` is not 0."""
        if port:
            start_http_server(port, addr=host, registry=self.registry)
