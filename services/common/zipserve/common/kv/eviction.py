"""Which blocks of a cache are worth keeping. Pure: it knows names, no memory.

No single rule suits all traffic: conversations reward recency, shared documents reward frequency, and a scan of prompts
that never come back ruins a cache that goes by recency alone. Two rules therefore play the same requests on paper, and
the one that has hit more lately decides (`Duel`).
"""

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from typing import Protocol

_HALF_LIFE_REQUESTS = 500
"""After so many requests a hit counts half."""
_HALF_LIFE_FACTOR = 0.5 ** (1 / _HALF_LIFE_REQUESTS)
_SMALL_SHARE = 0.1
_USES_MAX = 3


class Rule(Protocol):
    """An order in which names leave."""

    def add(self, name: bytes) -> None:
        """A name that is not there comes."""

    def use(self, name: bytes) -> None:
        """A name that is there is asked for."""

    def pop(self) -> bytes:
        """Takes out the name that is worth least; there is at least one."""


class Lru:
    """Least recently used first."""

    def __init__(self) -> None:
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def add(self, name: bytes) -> None:
        """See Rule."""
        self._names[name] = None

    def use(self, name: bytes) -> None:
        """See Rule."""
        self._names.move_to_end(name)

    def pop(self) -> bytes:
        """See Rule."""
        return self._names.popitem(last=False)[0]


class S3Fifo:
    """Names pass through a small queue, and get into the main one only if they are asked for again.

    Source: Yang et al., FIFO queues are all you need for cache eviction (SOSP 2023), section 4.

    Args:
        ghosts: names that are remembered after they left the small queue; one that comes back goes to the main queue.
    """

    def __init__(self, ghosts: int) -> None:
        self._small: OrderedDict[bytes, int] = OrderedDict()
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._ghosts_max = ghosts

    def add(self, name: bytes) -> None:
        """See Rule."""
        known = name in self._ghosts
        if known:
            del self._ghosts[name]
        (self._main if known else self._small)[name] = 0

    def use(self, name: bytes) -> None:
        """See Rule."""
        queue = self._small if name in self._small else self._main
        queue[name] = min(queue[name] + 1, _USES_MAX)

    def pop(self) -> bytes:
        """See Rule."""
        while True:
            if not self._main or len(self._small) > _SMALL_SHARE * (len(self._small) + len(self._main)):
                name, uses = self._small.popitem(last=False)
                if not uses:
                    self._remember(name)
                    return name
                self._main[name] = 0
            else:
                name, uses = self._main.popitem(last=False)
                if not uses:
                    return name
                self._main[name] = uses - 1

    def _remember(self, name: bytes) -> None:
        self._ghosts[name] = None
        if len(self._ghosts) > self._ghosts_max:
            self._ghosts.popitem(last=False)


class Duel:
    """Tells which names the better of two rules would hold in a cache of `capacity` names, and which others are there.

    Args:
        here: the names that the cache really holds. Whoever changes them says so with `came` and `gone`.
    """

    def __init__(self, capacity: int, here: Container[bytes] = ()) -> None:
        self._players = (_Player(Lru(), capacity, here), _Player(S3Fifo(capacity), capacity, here))
        self._leader = self._players[0]

    def request(self, names: Sequence[bytes]) -> None:
        """A sequence of blocks was asked for, of which the leading run that is held is a hit."""
        for player in self._players:
            player.request(names)
        best = max(player.score for player in self._players)
        if best > self._leader.score:
            self._leader = next(player for player in self._players if player.score == best)

    def keeps(self, name: bytes) -> bool:
        """Whether the rule that leads would still hold a name."""
        return name in self._leader.held

    def came(self, name: bytes) -> None:
        """A name is here from now on."""
        for player in self._players:
            if name not in player.held:
                player.spare[name] = None

    def gone(self, name: bytes) -> None:
        """A name is not here any more."""
        for player in self._players:
            player.spare.pop(name, None)

    def spare(self) -> Iterable[bytes]:
        """Names that are here, but that the rule which leads would not hold any more; the first to go comes first."""
        return self._leader.spare


class _Player:
    """A rule with the cache that it would have, and how well it does."""

    def __init__(self, rule: Rule, capacity: int, here: Container[bytes]) -> None:
        self._rule = rule
        self._capacity = capacity
        self._here = here
        self.held: set[bytes] = set()
        self.spare: OrderedDict[bytes, None] = OrderedDict()
        """Names that are here and not held."""
        self.score = 0.0

    def request(self, names: Sequence[bytes]) -> None:
        hits = next((i for i, name in enumerate(names) if name not in self.held), len(names))
        self.score = self.score * _HALF_LIFE_FACTOR + hits
        for name in reversed(names):  # so that the last block of a sequence leaves before the first one
            if name in self.held:
                self._rule.use(name)
            else:
                self.held.add(name)
                self.spare.pop(name, None)
                self._rule.add(name)
        while len(self.held) > self._capacity:
            name = self._rule.pop()
            self.held.remove(name)
            if name in self._here:
                self.spare[name] = None
