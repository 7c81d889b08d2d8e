"""Requests to a cache of blocks, as lists of block names in the order of their positions."""

import random
from collections.abc import Callable

Trace = list[list[bytes]]


def _chain(*parts: tuple[object, int]) -> list[bytes]:
    """Names of a sequence: so many blocks of each part, one after the other."""
    return [repr((name, block)).encode() for name, blocks in parts for block in range(blocks)]


def zipf(requests: int = 4000, documents: int = 1500, exponent: float = 0.9) -> Trace:
    """Documents of 1 to 8 blocks, some of them asked for far more often than others."""
    draw = random.Random(1)
    sizes = [draw.randint(1, 8) for _ in range(documents)]
    weights = [1 / (rank + 1) ** exponent for rank in range(documents)]
    return [_chain((d, sizes[d])) for d in draw.choices(range(documents), weights, k=requests)]


def chats(requests: int = 3000, at_once: int = 20, turns: int = 8, systems: int = 20) -> Trace:
    """Conversations that take turns; each grows by 1 to 3 blocks a turn behind one of some system prompts."""
    draw = random.Random(2)
    trace: Trace = []
    live: list[list[int]] = []
    for _ in range(requests):
        while len(live) < at_once:
            number = len(trace) * at_once + len(live)
            live.append([number, draw.randrange(systems), draw.randint(1, turns), 3])
        chat = draw.choice(live)
        chat[3] += draw.randint(1, 3)
        chat[2] -= 1
        trace.append(_chain((("system", chat[1]), 2), (chat[0], chat[3])))
        if not chat[2]:
            live.remove(chat)
    return trace


def mixed_chats() -> Trace:
    """Most have one turn only, all stand behind one system prompt."""
    draw = random.Random(3)
    long = iter(chats(systems=1, turns=12))
    return [
        next(long) if draw.random() < 0.6 else _chain((("system", 0), 2), (("once", i), draw.randint(3, 6)))
        for i in range(3000)
    ]


def scan(requests: int = 3000, documents: int = 30, system_blocks: int = 0) -> Trace:
    """Documents that are used again and again, among long prompts that never come back."""
    draw = random.Random(4)
    parts = [(("document", draw.randrange(documents)), 4) if draw.random() < 0.5 else (i, 16) for i in range(requests)]
    return [_chain(("system", system_blocks), part) for part in parts]


TRACES: dict[str, tuple[Callable[[], Trace], int]] = {
    "zipf": (zipf, 600),
    "zipf, flat": (lambda: zipf(exponent=0.6), 600),
    "chats": (chats, 300),
    "many chats": (lambda: chats(at_once=40), 300),
    "mixed chats": (mixed_chats, 300),
    "scan": (scan, 200),
    "scan behind a system prompt": (lambda: scan(system_blocks=2), 200),
}
"""Traces by name, each with the blocks of a cache that is too small for it."""
