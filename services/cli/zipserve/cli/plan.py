"""Which processes make a stack, and with which settings. Pure: starts nothing, reads no clock and no environment."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

SERVICES = ("kvstore", "prefill", "decode", "router")
_STOP_RANK = {"router": 0, "prefill": 1, "decode": 1, "kvstore": 2}
# Command lines are visible to every user of the machine.
_SECRET_FIELDS = ("secret", "redis_url")


@dataclass(frozen=True)
class ChildSpec:
    """One process to start."""

    name: str
    """Unique; of a worker also its id in the registry, stable over restarts."""
    role: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Added to our own."""
    stdin: str = field(default="", repr=False)
    """Fed to the process, then closed."""
    stop_rank: int = 0
    """Processes of a lower rank are stopped before those of a higher one."""


@dataclass(frozen=True)
class Stack:
    """What the processes of one stack share, and what the user chose."""

    prefill: int
    """Prefill workers; without any, the decode workers compute the prompts."""
    decode: int
    model: str
    listen: str
    """host:port of the router; the port is fixed."""
    cluster: str
    redis_url: str = field(repr=False)
    secret: str = field(repr=False)
    drain_s: float
    http_listen: str = ""
    """host:port of the router's HTTP API; the port is fixed. Empty: none."""
    threads: int | None = None
    """Per worker. None: all cores are shared out."""
    kv_blocks: int | None = None
    """Per worker. None: the workers' default."""
    codec: str | None = None
    """Of KV blocks, the same for all workers. None: the workers' default."""
    overrides: tuple[tuple[str, str, str], ...] = ()
    """(service, field, value), the last one wins."""


def parse_override(text: str) -> tuple[str, str, str]:
    """Splits SERVICE.FIELD=VALUE.

    Raises:
        ValueError: it has another form, or there is no such service.
    """
    name, equals, value = text.partition("=")
    service, dot, setting = name.partition(".")
    setting = setting.replace("-", "_")
    if not (equals and dot and setting.isidentifier()):
        raise ValueError(f"{text!r} is not of the form SERVICE.FIELD=VALUE")
    if service not in SERVICES:
        raise ValueError(f"{service!r} is no service; services are {', '.join(SERVICES)}")
    return service, setting, value


def divide_threads(cores: int, workers: int) -> list[int]:
    """Shares cores out as evenly as possible, at least one each; the first workers get what is left over."""
    share, rest = divmod(cores, workers)
    return [max(1, share + (index < rest)) for index in range(workers)]


def children(stack: Stack, cores: int) -> list[ChildSpec]:
    """The processes of a stack, Redis excepted, in the order in which they are shown."""
    workers = [("prefill", i) for i in range(stack.prefill)] + [("decode", i) for i in range(stack.decode)]
    threads = [stack.threads] * len(workers) if stack.threads else divide_threads(cores, len(workers))
    of_worker: dict[str, str] = {"model": stack.model, "listen": "127.0.0.1:0"}
    if stack.kv_blocks is not None:
        of_worker["kv_blocks"] = str(stack.kv_blocks)
    if stack.codec is not None:
        of_worker["codec"] = stack.codec
    of_router = {"model": stack.model, "listen": stack.listen}
    if stack.http_listen:
        of_router["http_listen"] = stack.http_listen
    if not stack.prefill:
        of_router["local_prefill_tokens_max"] = "-1"
    return [
        _child(stack, "router", "router", of_router, 1),
        *(
            _child(stack, service, f"{service}-{index}", {**of_worker, "threads": str(share)}, share)
            for (service, index), share in zip(workers, threads, strict=True)
        ),
        _child(stack, "kvstore", "kvstore-0", {"listen": "127.0.0.1:0"}, 1),
    ]


def service_command(service: str) -> list[str]:
    """How a service is started, without its settings."""
    # -P: `python -m` would put the working directory on the path, where transformers takes kernels/ for a package.
    return [sys.executable, "-P", "-m", f"zipserve.{service}"]


def _child(stack: Stack, service: str, name: str, settings: Mapping[str, str], threads: int) -> ChildSpec:
    values = {
        "worker_id": name,
        "cluster": stack.cluster,
        "drain_s": f"{stack.drain_s:g}",
        "metrics_port": "0",
        **settings,
        "secret": stack.secret,
        "redis_url": stack.redis_url,
        **_overrides_of(stack.overrides, service),
    }
    environment = {f"ZIPSERVE_{service}_{name}".upper(): values.pop(name) for name in _SECRET_FIELDS}
    environment["OMP_NUM_THREADS"] = str(threads)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return ChildSpec(
        name=name,
        role=service,
        command=(*service_command(service), *arguments),
        environment=environment,
        stop_rank=_STOP_RANK[service],
    )


def _overrides_of(overrides: Iterable[tuple[str, str, str]], service: str) -> dict[str, str]:
    return {setting: value for of, setting, value in overrides if of == service}
