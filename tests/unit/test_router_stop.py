"""Stop strings: the result depends on the text alone, not on how it was cut into pieces."""

from hypothesis import example, given
from hypothesis import strategies as st

from stop_strings import stopped
from zipserve.router.stop import StopMatcher

# few letters, so that overlaps, borders and near misses are common
LETTERS = st.sampled_from("ab\n")
TEXTS = st.lists(st.text(LETTERS, max_size=6), max_size=8)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        released = matcher.feed(piece)
        shown += released.text
        if released.stop is not None:
            assert matcher.flush() == ""
            return shown, released.stop
    return shown + matcher.flush(), None


@given(TEXTS, STOPS)
@example(["ab", "c", "d"], ["bcd", "abce"])
@example(["aa", "ab"], ["aab"])
@example(["abcd"], ["abcd", "bc"])
def test_shows_what_comes_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == stopped("".join(pieces), stops)


@given(TEXTS, STOPS)
def test_holds_back_only_what_may_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        released = matcher.feed(piece)
        shown += released.text
        if released.stop is not None:
            return
        held = text.removeprefix(shown)
        assert shown + held == text
        beginnings = {stop[:length] for stop in stops for length in range(len(stop))} | {""}
        assert held == max((b for b in beginnings if text.endswith(b)), key=len)


def test_a_held_beginning_comes_out_when_it_ends_differently() -> None:
    matcher = StopMatcher(["</answer>"])
    assert matcher.feed("4 </ans") == ("4 ", None)
    assert matcher.feed("wer") == ("", None)
    assert matcher.feed("ing") == ("</answering", None)


def test_cost_is_linear_in_the_text() -> None:
    stops = ["a" * 255 + "b"] * 16
    assert run(["a" * 20_000], stops) == ("a" * 20_000, None)
