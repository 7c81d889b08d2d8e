"""What a client sees of a stream: the whole text up to the first stop string, whatever tokens, bytes and events it
comes in, and never half a character."""

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from router_model import SPECIALS, byte_tokenizer
from stop_strings import stopped
from zipserve.common.sampling import Sampling
from zipserve.router.detokenizer import Detokenizer
from zipserve.router.job import Job
from zipserve.router.transcript import Transcript
from zipserve.v1.sampling_pb2 import FinishReason

TOKENIZER = byte_tokenizer()
# emoji of several code points, combining marks, scripts of two to four bytes a character
CHARACTERS = ["a", "b", " ", "\n", "é", "e\u0301", "क्षि", "日", "本", "👩\u200d🚀", "🏳️", "\u0301", "\u200d"]
TEXT = st.lists(st.sampled_from(CHARACTERS), max_size=12).map("".join)
STOP = st.lists(st.sampled_from(CHARACTERS), min_size=1, max_size=3).map("".join)


@given(TEXT, st.lists(STOP, max_size=3), st.data())
@example("x👩\u200d🚀日", ["\u200d🚀"], None)
@example("e\u0301é", ["\u0301"], None)
def test_streams_are_the_whole_text_up_to_the_first_stop(text: str, stops: list[str], data: Any) -> None:
    token_ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    job = Job("r", (3,), Sampling(), max(1, len(token_ids)), tuple(stops), frozenset())
    skipped = frozenset(range(len(SPECIALS)))
    transcript = Transcript(job, Detokenizer(lambda ids: TOKENIZER.decode(ids, skip_special_tokens=True), skipped))
    shown, start = "", 0
    while start < len(token_ids) and transcript.finish is None:
        size = 1 if data is None else data.draw(st.integers(1, 5))
        shown += transcript.append(transcript.position, token_ids[start : start + size]).text
        start += size
        assert "\ufffd" not in shown
        assert text.startswith(shown)
    if transcript.finish is None:
        shown += transcript.end(FinishReason.FINISH_REASON_STOP).text
    assert (shown, transcript.stop_string) == stopped(text, stops)
