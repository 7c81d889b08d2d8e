"""What was measured, as a table and as bars. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zipserve.bench import report
from zipserve.bench.report import Check
from zipserve.bench.timing import Timing
from zipserve.common.kv.layout import Layout

WAYS = ("pull", "transfer", "raw", "memcpy", "verify")
SHARE_OF_RAW = 0.8
"""Of raw NIXL's bandwidth, that a transfer must reach."""
SHARE_FROM_BLOCKS = 4
TIMES_SMALLER = 4.4
"""Than fp16 keys and values, that a zipped sequence must be."""


@dataclass(frozen=True)
class Moved:
    """Sequences of one length, moved in all ways."""

    transport: str
    codec: str
    tokens: int
    size_bytes: int
    """Of one sequence, as NIXL counted them."""
    timings: dict[str, Timing]
    """By way."""

    def rate_bytes_s(self, way: str) -> float:
        """Of the median."""
        return self.size_bytes / self.timings[way].median_s

    def share_of_raw(self, way: str) -> float:
        """How much of raw NIXL's bandwidth a way reaches."""
        return self.rate_bytes_s(way) / self.rate_bytes_s("raw")


def fp16_bytes(layout: Layout, tokens: int) -> int:
    """Of keys and values of so many tokens, and nothing else."""
    return 2 * tokens * layout.layers * layout.kv_heads * (layout.key_dim + layout.value_dim)


def checks(moved: Sequence[Moved], layouts: dict[str, Layout], tokens: int, *, decides: bool) -> list[Check]:
    """The bars. Bytes are the same in every run, and always decide.

    Args:
        tokens: of the sequences whose bytes count.
    """
    found = []
    for transport, codec in dict.fromkeys((one.transport, one.codec) for one in moved):
        some = [one for one in moved if (one.transport, one.codec) == (transport, codec)]
        long = [one for one in some if one.tokens >= SHARE_FROM_BLOCKS * layouts[codec].block_tokens]
        for way, what, matters in (("transfer", "transfers", decides), ("pull", "whole pulls", False)):
            share = min((one.share_of_raw(way) for one in long), default=float("nan"))
            name = (
                f"{codec} over {transport}: {what} from {SHARE_FROM_BLOCKS} blocks on, least share of raw NIXL's GB/s"
            )
            found.append(Check(name, share, ">=", SHARE_OF_RAW, matters))
        for one in some:
            if one.tokens == tokens and codec.startswith("zip-"):
                smaller = fp16_bytes(layouts[codec], tokens) / one.size_bytes
                name = f"{codec} over {transport}: {tokens} tokens, times fewer bytes than fp16"
                found.append(Check(name, smaller, ">=", TIMES_SMALLER))
    return found


def table(moved: Iterable[Moved], layouts: dict[str, Layout]) -> str:
    """GB/s of the median, with p10 and p90, by way, and how transfers and pulls stand to raw NIXL."""
    head = ("sequence", "MB", *WAYS, "transfer/raw", "pull/raw")
    return report.table(head, (_line(one, layouts[one.codec]) for one in moved))


def _line(one: Moved, layout: Layout) -> tuple[str, ...]:
    blocks, rest = divmod(one.tokens, layout.block_tokens)
    length = f"{blocks} blocks" if not rest else f"{one.tokens} tokens"
    rates = (
        " ".join(f"{one.size_bytes / seconds / 1e9:.2f}" for seconds in (found.median_s, found.p90_s, found.p10_s))
        for found in (one.timings[way] for way in WAYS)
    )
    shares = (f"{one.share_of_raw(way):.0%}" for way in ("transfer", "pull"))
    return f"{one.codec} {one.transport} {length}", f"{one.size_bytes / 1e6:.2f}", *rates, *shares
