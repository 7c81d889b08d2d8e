"""What stop strings do to a text, by definition."""


def stopped(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What comes before the stop string that ends it, and that one: the first to be complete, else the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None
