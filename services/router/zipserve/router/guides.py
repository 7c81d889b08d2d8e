"""Guides of requests, compiled before anything else is done for them: one that means nothing is refused at once."""

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.common.guide import Guide
from zipserve.common.guide_matcher import GuideTokenizer
from zipserve.router.counted import counted

_THREADS = 2
_WAITING_MAX = 64
"""Different guides, that wait to be compiled or are being compiled."""
_LATE_SHARE = 0.9
"""Of the time for a guide, that it must have had itself before it is called too costly."""


class GuideCheck:
    """Compiles guides in threads of its own, which a costly one holds up for others of its kind only."""

    def __init__(self, tokenizer: GuideTokenizer, compile_s: float) -> None:
        """
        Args:
            compile_s: longest time to wait for a guide, in seconds.
        """
        self._tokenizer = tokenizer
        self._compile_s = compile_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="guides")
        self._waiting: Counter[Guide] = Counter()

    async def check(self, guide: Guide) -> None:
        """Asserts that a guide can be followed, as far as can be said before the first token.

        Raises:
            InvalidRequestError: it cannot, or takes too long to compile; the message says why.
            OverloadedError: too many others are being compiled.
        """
        if guide not in self._waiting and len(self._waiting) >= _WAITING_MAX:
            raise OverloadedError(f"{len(self._waiting)} guides wait to be compiled, the limit is {_WAITING_MAX}")
        began_s: list[float] = []

        def compile_it() -> None:
            began_s.append(time.monotonic())
            self._tokenizer.check(guide)

        work = self._threads.submit(compile_it)
        try:
            with counted(self._waiting, guide):
                async with asyncio.timeout(self._compile_s):
                    await asyncio.wrap_future(work)
        except TimeoutError as error:
            if not began_s or time.monotonic() - began_s[0] < _LATE_SHARE * self._compile_s:  # its turn came late
                raise OverloadedError(f"no guide could be compiled for {self._compile_s:g} s") from error
            raise InvalidRequestError(
                f"{guide.field} takes more than {self._compile_s:g} s to compile", field=guide.field
            ) from error

    def close(self) -> None:
        """Lets the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
