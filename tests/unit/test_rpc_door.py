"""Tokens of a cluster: good for one method, for a while, and for nobody who has another secret."""

import pytest

from zipserve.common.errors import UnauthenticatedError
from zipserve.common.rpc.door import TOKEN_KEY, ClusterTokens

METHOD = "/zipserve.v1.PrefillService/Prefill"


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_token_is_good_for_its_method_and_time() -> None:
    clock = Clock()
    mine, theirs = ClusterTokens(b"secret", clock), ClusterTokens(b"secret", clock)
    token = mine.metadata(METHOD)
    theirs.admit(METHOD, [("other", b"x"), token])
    with pytest.raises(UnauthenticatedError, match="no token of this cluster"):
        theirs.admit("/zipserve.v1.PrefillService/ReleaseHandle", [token])
    for off_s, good in ((299.0, True), (301.0, False), (-299.0, True), (-301.0, False)):
        clock.now_s = Clock.now_s + off_s
        if good:
            theirs.admit(METHOD, [token])
        else:
            with pytest.raises(UnauthenticatedError, match="301 s off, at most 300 s"):
                theirs.admit(METHOD, [token])


def test_tokens_are_made_anew_before_they_are_too_old() -> None:
    clock = Clock()
    tokens = ClusterTokens(b"secret", clock)
    first = tokens.metadata(METHOD)
    assert tokens.metadata(METHOD) == first
    clock.now_s += 31
    assert tokens.metadata(METHOD) != first
    clock.now_s -= 3600  # a clock that is set back
    tokens.admit(METHOD, [tokens.metadata(METHOD)])


@pytest.mark.parametrize("token", ["", ".", "1000000", "1000000.", "1000000.00", "nan." + "0" * 64, "é.ü", "-"])
def test_what_is_no_token(token: str) -> None:
    with pytest.raises(UnauthenticatedError):
        ClusterTokens(b"secret", Clock()).admit(METHOD, [(TOKEN_KEY, token)])


def test_another_secret() -> None:
    clock = Clock()
    with pytest.raises(UnauthenticatedError):
        ClusterTokens(b"secret", clock).admit(METHOD, [ClusterTokens(b"Secret", clock).metadata(METHOD)])
