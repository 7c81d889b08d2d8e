"""Look-ups as text: records that give things a code, then queries for some of them. What later tokens look up is not
what earlier ones attended to, so this shows losses that ordinary text hides."""

import random
from dataclasses import dataclass

THINGS = """
    anchor apple arrow badge ball banana barn barrel basket beach bean bear bed bell belt bench berry
    bike bird blade board boat bone book boot bottle bowl box brick bridge broom brush bucket button cabin cable cage
    cake camel camera candle canoe cap card carpet carrot cart castle cat cave chain chair cheese cherry chest church
    clock cloud coat coin comb corn cotton cow crane cross crown cup curtain desk dish dog door drum duck eagle egg
    engine farm feather fence field fish flag flower flute forest fork fox frame frog garden gate glass glove goat
    gold goose grape guitar hammer hat hill horse hotel house iron island jacket jar jewel key king kitchen kite knife
    ladder lake lamp leaf lemon lens letter lion lock map mask medal milk mill mirror moon mouse nail needle nest
    nut oak ocean onion orange oven owl paddle paint palace panel paper park pearl pen pepper phone piano pie pig
    pillow pilot pine pipe pistol plane plate plum pocket pond pony pot prince pump purse queen rabbit radio raft
    rain ribbon rice ring river robe rock roof root rope rose saddle sail salt saw school seat shark sheep
    shelf shell ship shirt shoe shop silk silver soap spear spider spoon spring stable stamp star statue steel
    stone stool stove sugar sword table tent tiger tile torch tower train tree truck tube tunnel turtle valley
    vase village violin wagon wall watch whale wheel whistle window wine wolf wood
""".split()  # noqa: SIM905  words read better as text
CODE_DIGITS = 4


@dataclass(frozen=True)
class Lookups:
    """Records with a code each; no two are of the same thing."""

    codes: dict[str, str]
    """Code by thing, in the order of the records."""
    rng: random.Random

    @property
    def records(self) -> str:
        """All records, each with a space behind it but for the last."""
        return " ".join(sentence(thing, code) for thing, code in self.codes.items())

    def queried(self, first: int, count: int) -> list[str]:
        """Draws `count` things among the records from number `first` on, fewer if there are fewer."""
        known = list(self.codes)[first:]
        return self.rng.sample(known, min(count, len(known)))


def lookups(seed: int, number: int) -> Lookups:
    """All things in some order, with random codes: the same for the same seed and number."""
    rng = random.Random(f"retrieval {seed} {number}")  # noqa: S311  reproducible, and nothing depends on its secrecy
    things = rng.sample(THINGS, len(THINGS))
    return Lookups({thing: f"{rng.randrange(10**CODE_DIGITS):0{CODE_DIGITS}d}" for thing in things}, rng)


def sentence(thing: str, code: str) -> str:
    """A record, and also a query: of a query, the code is what the model is to find."""
    return f"The code of the {thing} is {code}."
