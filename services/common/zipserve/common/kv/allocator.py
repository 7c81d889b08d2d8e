"""Which slabs of an arena are free. Pure: it knows numbers, no memory."""

from collections import deque

from zipserve.common.errors import OverloadedError


class SlabAllocator:
    """Hands out slabs 0 .. count - 1 of one arena, oldest freed first, each time with a new generation.

    The oldest-first order keeps a freed slab untouched for as long as possible, so that a late reader meets a poisoned
    header rather than somebody else's bytes. A slab may be held several times, and is free when all have given it back.
    Not thread-safe: one thread owns it.
    """

    def __init__(self, count: int, what: str = "KV blocks") -> None:
        self.count = count
        self._what = what
        self._free = deque(range(count))
        self._generation: dict[int, int] = {}
        self._holders: dict[int, int] = {}
        """Of each slab that is held: how many times."""
        self._next_generation = 1

    @property
    def free(self) -> int:
        """Slabs that nobody holds."""
        return len(self._free)

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
            self._holders[slab] += 1

    def give_back(self, slabs: list[int]) -> None:
        """Gives slabs back; those that nobody else holds are free then.

        Raises:
            KeyError: one of them is not held (freed twice, or never taken); then none is freed.
        """
        self._check_held(slabs)
        for slab in slabs:
            self._holders[slab] -= 1
            if not self._holders[slab]:
                del self._holders[slab], self._generation[slab]
                self._free.append(slab)

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
