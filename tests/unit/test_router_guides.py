"""Guides on their way through the threads that compile them; a stand-in takes as long as a test says."""

import asyncio
import threading
from typing import Any, cast

import pytest

from polling import until
from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.common.guide import Guide
from zipserve.common.guide_matcher import GuideTokenizer
from zipserve.router.guides import _THREADS, _WAITING_MAX, GuideCheck


class Compiler:
    """Holds every guide until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.begun: list[Guide] = []

    def check(self, guide: Guide) -> None:
        self.begun.append(guide)
        self.let_go.wait(20)


def guide(number: int) -> Guide:
    return Guide("regex", (f"a{{{number + 1}}}",))


@pytest.fixture
def compiler() -> Any:
    compiler = Compiler()
    yield compiler
    compiler.let_go.set()


def checks(compiler: Compiler, compile_s: float) -> GuideCheck:
    return GuideCheck(cast(GuideTokenizer, compiler), compile_s)


async def test_a_guide_that_takes_too_long_is_refused(compiler: Compiler) -> None:
    with pytest.raises(InvalidRequestError, match=r"takes more than 0\.1 s to compile"):
        await checks(compiler, 0.1).check(guide(0))


async def test_time_behind_others_is_not_the_guides_own(compiler: Compiler) -> None:
    check = checks(compiler, 0.2)
    before = [asyncio.create_task(check.check(guide(i))) for i in range(_THREADS)]
    await until(lambda: len(compiler.begun) == _THREADS, "all threads are busy")
    with pytest.raises(OverloadedError):
        await check.check(guide(_THREADS))
    for refused in await asyncio.gather(*before, return_exceptions=True):
        assert isinstance(refused, InvalidRequestError)


async def test_only_different_guides_fill_the_queue(compiler: Compiler) -> None:
    check = checks(compiler, 20.0)
    same = [asyncio.create_task(check.check(guide(0))) for _ in range(2 * _WAITING_MAX)]
    others = [asyncio.create_task(check.check(guide(i))) for i in range(1, _WAITING_MAX)]
    await until(lambda: len(compiler.begun) == _THREADS, "they have begun")
    with pytest.raises(OverloadedError, match=f"the limit is {_WAITING_MAX}"):
        await check.check(guide(_WAITING_MAX))
    compiler.let_go.set()
    await asyncio.gather(*same, *others)
    await check.check(guide(_WAITING_MAX))
