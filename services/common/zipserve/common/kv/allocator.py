"""Which slabs of an arena are free. Pure: it knows numbers, no memory."""

from collections import deque

from zipserve.common.errors import OverloadedError


class SlabAllocator:
    """Hands out slabs 0 .. count - 1 of one arena, oldest freed first, each time with a new generation.

    The oldest-first order keeps a freed slab untouched for as long as possible, so that a late reader meets a poisoned
    header rather than somebody else's bytes. A slab may be held several times, and is free when all have given it back.
    One of the holders may `keep` it, which means that it will give it up when others need slabs. Not thread-safe: one
    thread owns it.
    """

    def __init__(self, count: int, what: str = "KV blocks") -> None:
        self.count = count
        self._what = what
        self._free = deque(range(count))
        self._generation: dict[int, int] = {}
        self._holders: dict[int, int] = {}
        """Of each slab that is held: how many times."""
        self._kept: set[int] = set()
        self._idle = 0
        self._next_generation = 1

    @property
    def free(self) -> int:
        """Slabs that nobody holds."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Slabs that are kept, and that nobody else holds."""
        return self._idle

    @property
    def used(self) -> int:
        """Slabs that somebody holds who does not only keep them."""
        return self.count - self.free - self.idle

    def take(self, count: int) -> list[int]:
        """Takes `count` slabs, all or none.

        Raises:
            OverloadedError: fewer are free.
        """
        if count > len(self._free):
            raise OverloadedError(f"needs {count} {self._what}, {len(self._free)} of {self.count} are free")
        slabs = [self._free.popleft() for _ in range(count)]
        for slab in slabs:
            self._holders[slab] = 1
            self._generation[slab] = self._next_generation
            self._next_generation += 1
        return slabs

    def generation(self, slab: int) -> int:
        """Generation of a slab that is held.

        Raises:
            KeyError: nobody holds it.
        """
        return self._generation[slab]

    def holders(self, slab: int) -> int:
        """How many times a slab is held; 0 where it is free."""
        return self._holders.get(slab, 0)

    def share(self, slabs: list[int]) -> None:
        """Holds slabs once more; each must be given back once more before it is free.

        Raises:
            KeyError: one of them is not held; then none is shared.
        """
        self._check_held(slabs)
        for slab in slabs:
            self._idle -= self.is_idle(slab)
            self._holders[slab] += 1

    def keep(self, slab: int) -> None:
        """Holds a slab once more, until it is given up.

        Raises:
            KeyError: it is not held, or is kept already.
        """
        if slab in self._kept:
            raise KeyError(f"slab {slab} is kept already")
        self.share([slab])
        self._kept.add(slab)

    def give_up(self, slab: int) -> list[int]:
        """Ends a `keep`, and returns the slab if it is free then.

        Raises:
            KeyError: it is not kept.
        """
        self._idle -= self.is_idle(slab)
        self._kept.remove(slab)
        return self.give_back([slab])

    def is_idle(self, slab: int) -> bool:
        """Whether a slab is kept, and nobody else holds it."""
        return slab in self._kept and self._holders[slab] == 1

    def give_back(self, slabs: list[int]) -> list[int]:
        """Gives slabs back, and returns those that nobody else holds: they are free then.

        Raises:
            KeyError: one of them is not held (freed twice, or never taken); then none is freed.
        """
        self._check_held(slabs)
        freed = []
        for slab in slabs:
            self._holders[slab] -= 1
            self._idle += self.is_idle(slab)
            if not self._holders[slab]:
                del self._holders[slab], self._generation[slab]
                self._free.append(slab)
                freed.append(slab)
        return freed

    def _check_held(self, slabs: list[int]) -> None:
        if len(set(slabs)) != len(slabs) or any(slab not in self._holders for slab in slabs):
            raise KeyError(f"not all of slabs {slabs} are held")

    def check_integrity(self) -> None:
        """Asserts that every slab is either free or held."""
        free, held = set(self._free), set(self._generation)
        if held != set(self._holders) or any(count < 1 for count in self._holders.values()):
            raise AssertionError(f"slabs {sorted(held)} have generations, {self._holders} have holders")
        if len(free) != len(self._free) or free & held or len(free) + len(held) != self.count:
            raise AssertionError(f"{len(self._free)} free and {len(held)} held slabs do not add up to {self.count}")
        if not self._kept <= held or self._idle != sum(self.is_idle(slab) for slab in self._kept):
            raise AssertionError(f"{self._idle} slabs are idle, {sorted(self._kept)} are kept")
