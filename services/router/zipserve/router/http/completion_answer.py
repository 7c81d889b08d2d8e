"""POST /v1/completions: the answers as a whole, and as a stream of chunks.

The choices of the prompt of index p have the indexes from p × n on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zipserve.router.frontend import Event, Finished, Started
from zipserve.router.http import logprobs
from zipserve.router.http.answer import Head, Usage, reason_of
from zipserve.router.http.fields import dumps
from zipserve.router.http.logprobs import CompletionLogprobs, Tokens
from zipserve.router.http.sse import DONE, Frames
from zipserve.router.transcript import Chunk
from zipserve.v1.inference_service_pb2 import PromptLogprobs
from zipserve.v1.sampling_pb2 import TokenLogprobs


@dataclass(frozen=True)
class CompletionStyle:
    """What a completion request wants to see."""

    n: int = 1
    logprobs: bool = False
    echo: tuple[str, ...] | None = None
    """The text of each prompt, if it is told before what follows it."""
    only_echo: bool = False
    """What is generated is not told."""
    prompt_logprobs: bool = False
    """vLLM's are told."""
    usage: bool = False
    """A stream ends with the counted tokens."""


@dataclass
class _Prompt:
    token_ids: Sequence[int] = ()
    ends: frozenset[int] = frozenset()
    logprobs: Sequence[TokenLogprobs] = ()


@dataclass(frozen=True)
class Part:
    """What an event adds to the choice of an index."""

    index: int
    text: str
    logprobs: dict[str, list[Any]] | None
    end: dict[str, Any] | None = None

    @property
    def says(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.text or self.logprobs or self.end)


class Completions:
    """Turns events of several prompts into parts of choices."""

    def __init__(self, tokens: Tokens, style: CompletionStyle) -> None:
        self.usage = Usage()
        self._tokens, self._style = tokens, style
        self._prompts: dict[int, _Prompt] = {}
        self._found: dict[int, CompletionLogprobs] = {}
        """By choice that has begun."""

    def take(self, prompt: int, event: Event) -> list[Part]:
        """What the next event of the prompt of an index adds."""
        match event:
            case Started():
                self._prompts[prompt] = _Prompt(event.job.prompt, event.job.stop_token_ids)
            case PromptLogprobs():
                self._prompts[prompt].logprobs = event.logprobs
            case Chunk():
                index = prompt * self._style.n + event.choice
                parts = self._begin(prompt, index)
                if not self._style.only_echo:
                    parts.append(Part(index, event.text, self._logprobs(prompt, index, event)))
                return parts
            case Finished():
                index = prompt * self._style.n + event.choice
                self.usage.count(prompt, event, generated=not self._style.only_echo)
                return [*self._begin(prompt, index), Part(index, "", None, self._end(event))]
        return []

    def prompt_logprobs(self, index: int) -> list[Any] | None:
        """vLLM's, of the prompt of a choice."""
        prompt = self._prompts[index // self._style.n]
        if not self._style.prompt_logprobs:
            return None
        return logprobs.of_prompt(self._tokens, prompt.token_ids, prompt.logprobs)

    def _begin(self, prompt: int, index: int) -> list[Part]:
        """The echo, before anything else of a choice."""
        if index in self._found:
            return []
        found = self._found[index] = CompletionLogprobs(self._tokens)
        if self._style.echo is None:
            return []
        of = self._prompts[prompt]
        told = found.add(of.token_ids, [None, *of.logprobs]) if self._style.logprobs else None
        return [Part(index, self._style.echo[prompt], told)]

    def _logprobs(self, prompt: int, index: int, chunk: Chunk) -> dict[str, list[Any]] | None:
        if not self._style.logprobs:
            return None
        # the token that ends an answer is no part of it
        ends = self._prompts[prompt].ends
        shown = [i for i, token_id in enumerate(chunk.token_ids) if token_id not in ends]
        if not shown:
            return None
        return self._found[index].add([chunk.token_ids[i] for i in shown], [chunk.logprobs[i] for i in shown])

    def _end(self, finished: Finished) -> dict[str, Any]:
        if self._style.only_echo:
            return {"finish_reason": "length", "stop_reason": None}
        return {"finish_reason": reason_of(finished), "stop_reason": finished.stop_string or None}


@dataclass
class _Whole:
    text: list[str] = field(default_factory=list)
    logprobs: dict[str, list[Any]] | None = None
    end: dict[str, Any] = field(default_factory=dict)


class CompletionAnswer:
    """Gathers events into the one JSON object."""

    def __init__(self, head: Head, tokens: Tokens, style: CompletionStyle) -> None:
        self._head = head
        self._choices = Completions(tokens, style)
        self._whole: dict[int, _Whole] = {}

    def take(self, prompt: int, event: Event) -> None:
        """Takes the next event of the prompt of an index."""
        for part in self._choices.take(prompt, event):
            whole = self._whole.setdefault(part.index, _Whole())
            whole.text.append(part.text)
            if part.logprobs is not None and whole.logprobs is None:
                whole.logprobs = part.logprobs
            elif part.logprobs is not None and whole.logprobs is not None:
                for name, values in part.logprobs.items():
                    whole.logprobs[name] += values
            whole.end |= part.end or {}

    def body(self) -> dict[str, Any]:
        """The answer."""
        choices = []
        for index, whole in sorted(self._whole.items()):
            choice = {"index": index, "text": "".join(whole.text), "logprobs": whole.logprobs, **whole.end}
            prompt_logprobs = self._choices.prompt_logprobs(index)
            choices.append(choice if prompt_logprobs is None else choice | {"prompt_logprobs": prompt_logprobs})
        return self._head.fields("text_completion") | {"choices": choices, "usage": self._choices.usage.fields()}


class CompletionStream:
    """Turns events into chunks."""

    def __init__(self, head: Head, tokens: Tokens, style: CompletionStyle) -> None:
        self._choices = Completions(tokens, style)
        self._frames = Frames(head, "text_completion", tells_usage=style.usage)
        self._usage = style.usage

    def take(self, prompt: int, event: Event) -> bytes:
        """The chunks that the next event of the prompt of an index makes; none of some."""
        return b"".join(self._chunk(part) for part in self._choices.take(prompt, event) if part.says)

    def end(self) -> bytes:
        """What comes when all choices have ended."""
        return (self._frames.usage(self._choices.usage.fields()) if self._usage else b"") + DONE

    def _chunk(self, part: Part) -> bytes:
        values = {"index": part.index, "text": part.text, "logprobs": part.logprobs, "finish_reason": None}
        return self._frames.choice(dumps(values | (part.end or {})))
