"""`python -m zipserve.bench NAME …`, also `zipserve bench NAME …`; without a name, lists the benchmarks."""

import importlib
import sys
from collections.abc import Sequence

from zipserve.common.errors import ZipserveError

BENCHMARKS = {
    "quality": "what each KV codec costs: KL, perplexity, agreement, retrieval, and bits",
    "engine": "decode steps and prefill beside rivals and the machine's limits",
    "kernels": "operations on KV blocks beside references, SDPA and the memory's bandwidth",
    "claims": "ZipCache's claims about latency and size, side by side on a served model",
    "prefix": "prompts that begin alike: what finding their blocks saves, on whole stacks",
    "serve": "an open loop of requests against an endpoint or a stack: latencies, rates, goodput",
    "goodput": "arrangements of the same cores, and a rival's: the rate that each bears within objectives",
    "router": "what one router process adds, and how many tokens go through it, before stub workers",
    "transfer": "KV pulls between two processes beside raw NIXL and memcpy, and the bytes that they move",
}
_INTERRUPTED = 128 + 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark.

    Returns:
        The exit status: 0 if all bars are met, 1 if not, 2 if it could not run.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("", "-h", "--help"):
        print("usage: zipserve bench NAME [--quick] [--json] [options of its own]\n\nbenchmarks:")
        print("\n".join(f"  {known:<12}{what}" for known, what in BENCHMARKS.items()))
        return 0
    if name not in BENCHMARKS:
        sys.stderr.write(f"zipserve bench: no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}\n")
        return 2
    command = importlib.import_module(f"zipserve.bench.{name}.command")
    try:
        status: int = command.run(command.parser().parse_args(rest))
    except ZipserveError as error:
        sys.stderr.write(f"zipserve bench {name}: {error.message}\n")
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
