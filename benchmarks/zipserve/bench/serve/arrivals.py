"""When requests arrive, and how long they are. Pure: the randomness is handed in."""

import csv
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zipserve.common.errors import InvalidRequestError

PROCESSES = ("poisson", "constant", "gamma")


@dataclass(frozen=True)
class Arrival:
    """One request to come."""

    at_s: float
    """After the start."""
    prompt_tokens: int
    output_tokens: int


def times(process: str, rate: float, randomness: random.Random, burstiness: float = 1.0) -> Iterator[float]:
    """Seconds after the start at which requests arrive, without end.

    Args:
        process: one of PROCESSES.
        rate: requests per second in the long run.
        burstiness: of `gamma`: coefficient of variation of the gaps; 0 would be constant, 1 is Poisson.
    """
    shape = 1 / burstiness**2
    gaps: dict[str, Callable[[], float]] = {
        "constant": lambda: 1 / rate,
        "poisson": lambda: randomness.expovariate(rate),
        "gamma": lambda: randomness.gammavariate(shape, 1 / (rate * shape)),
    }
    return itertools.accumulate(iter(gaps[process], None))


@dataclass(frozen=True)
class Length:
    """A distribution of lengths in tokens."""

    kind: str
    a: float
    b: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Length":
        """From `N`, `uniform:LOW:HIGH`, `normal:MEAN:DEVIATION` or `lognormal:MEDIAN:SIGMA`.

        Raises:
            ValueError: it is none of these.
        """
        kind, *numbers = text.split(":") if ":" in text else ("fixed", text)
        wanted = {"fixed": 1, "uniform": 2, "normal": 2, "lognormal": 2}.get(kind, 0)
        values = [float(number) for number in numbers]
        if not wanted or len(values) != wanted or values[0] < 1:
            raise ValueError(f"{text!r} is no length: N, uniform:LOW:HIGH, normal:MEAN:DEV or lognormal:MEDIAN:SIGMA")
        return cls(kind, *values)

    def draw(self, randomness: random.Random) -> int:
        """A length of at least 1."""
        match self.kind:
            case "uniform":
                return randomness.randint(int(self.a), int(self.b))
            case "normal":
                return max(1, round(randomness.gauss(self.a, self.b)))
            case "lognormal":
                return max(1, round(self.a * randomness.lognormvariate(0.0, self.b)))
            case _:
                return int(self.a)


def drawn(count: int, at: Iterator[float], prompt: Length, output: Length, randomness: random.Random) -> list[Arrival]:
    """Arrivals at these times, their lengths drawn."""
    return [Arrival(at_s, prompt.draw(randomness), output.draw(randomness)) for at_s in itertools.islice(at, count)]


def read_trace(path: Path, speed: float = 1.0) -> list[Arrival]:
    """Arrivals of a file: CSV with a head, or JSON lines, of arrival_s, prompt_tokens and output_tokens.

    Args:
        speed: 2 plays the trace twice as fast.

    Raises:
        InvalidRequestError: a line lacks a field, or has one that is no such number.
        OSError: the file cannot be read.
    """
    lines = path.read_text().splitlines()
    rows: Iterator[dict[str, str | float]]
    if lines and lines[0].lstrip().startswith("{"):
        rows = (json.loads(line) for line in lines if line.strip())
    else:
        rows = iter(csv.DictReader(lines))
    found: list[Arrival] = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(Arrival(float(row["arrival_s"]) / speed, int(row["prompt_tokens"]), int(row["output_tokens"])))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"{path}, request {number}: needs the numbers arrival_s, prompt_tokens, output_tokens", field="trace"
            ) from error
        if found[-1].at_s < 0 or min(found[-1].prompt_tokens, found[-1].output_tokens) < 1:
            raise InvalidRequestError(f"{path}, request {number}: {found[-1]} is out of range", field="trace")
    return sorted(found, key=lambda arrival: arrival.at_s)


def prompts(
    arrivals: Sequence[Arrival], text: Sequence[int], vocab_tokens: int, randomness: random.Random
) -> list[list[int]]:
    """Token ids for each arrival: pieces of a text from random places, or without one random ids.

    The lowest eighth of the vocabulary, where special tokens and single bytes stand, is left out of random ids.
    """
    if not text:
        low = vocab_tokens // 8
        return [[randomness.randrange(low, vocab_tokens) for _ in range(a.prompt_tokens)] for a in arrivals]
    found: list[list[int]] = []
    for arrival in arrivals:
        start = randomness.randrange(len(text))
        found.append(list(itertools.islice(itertools.cycle(text), start, start + arrival.prompt_tokens)))
    return found
