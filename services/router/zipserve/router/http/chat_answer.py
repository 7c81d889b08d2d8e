"""POST /v1/chat/completions: the answer as a whole, and as a stream of chunks."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zipserve.router.frontend import Event, Finished, Started
from zipserve.router.http import logprobs
from zipserve.router.http.answer import Head, Usage, reason_of
from zipserve.router.http.fields import dumps
from zipserve.router.http.logprobs import Tokens
from zipserve.router.http.sse import DONE, Frames
from zipserve.router.http.tool_calls import Called, Piece, Said, ToolCallParser
from zipserve.router.http.tools import CALL_END
from zipserve.router.transcript import Chunk
from zipserve.v1.inference_service_pb2 import PromptLogprobs


@dataclass(frozen=True)
class ChatStyle:
    """What a chat request wants to see."""

    logprobs: bool = False
    calls: bool = False
    """Calls of tools are told as such."""
    usage: bool = False
    """A stream ends with the counted tokens."""


class _Choices:
    """What both forms of an answer keep of its choices."""

    def __init__(self, head: Head, tokens: Tokens, style: ChatStyle, draw_id: Callable[[], str]) -> None:
        self._head, self._tokens, self._style, self._draw_id = head, tokens, style, draw_id
        self._parsers: defaultdict[int, ToolCallParser] = defaultdict(ToolCallParser)
        self._ends: frozenset[int] = frozenset()
        self._usage = Usage()

    def _started(self, started: Started) -> None:
        self._ends = started.job.stop_token_ids

    def _logprobs(self, chunk: Chunk) -> list[dict[str, Any]]:
        if not self._style.logprobs:
            return []
        # the token that ends an answer is no part of it
        shown = [i for i, token_id in enumerate(chunk.token_ids) if token_id not in self._ends]
        return logprobs.of_chat(self._tokens, [chunk.token_ids[i] for i in shown], [chunk.logprobs[i] for i in shown])

    def _pieces(self, chunk: Chunk) -> Sequence[Piece]:
        if not self._style.calls:
            return (Said(chunk.text),) if chunk.text else ()
        return self._parsers[chunk.choice].feed(chunk.text)

    def _rest(self, choice: int) -> Sequence[Piece]:
        return self._parsers[choice].flush() if self._style.calls else ()

    def _reason(self, finished: Finished) -> dict[str, Any]:
        reason = reason_of(finished)
        if reason == "stop" and self._style.calls and self._parsers[finished.choice].calls:
            reason = "tool_calls"
        stop = finished.stop_string or None
        return {"finish_reason": reason, "stop_reason": None if self._style.calls and stop == CALL_END else stop}


@dataclass
class _Message:
    text: list[str] = field(default_factory=list)
    calls: list[tuple[str, list[str]]] = field(default_factory=list)
    """Names, and the pieces of the arguments."""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)

    def take(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Said):
                self.text.append(piece.text)
            elif isinstance(piece, Called):
                self.calls.append((piece.name, []))
            else:
                self.calls[piece.index][1].append(piece.text)


class ChatAnswer(_Choices):
    """Gathers events into the one JSON object."""

    def __init__(self, head: Head, tokens: Tokens, style: ChatStyle, draw_id: Callable[[], str]) -> None:
        super().__init__(head, tokens, style, draw_id)
        self._messages: defaultdict[int, _Message] = defaultdict(_Message)
        self._prompt: Sequence[int] = ()
        self._prompt_logprobs: list[Any] | None = None

    def take(self, event: Event) -> None:
        """Takes the next event."""
        match event:
            case Started():
                self._started(event)
                self._prompt = event.job.prompt
            case PromptLogprobs():
                self._prompt_logprobs = logprobs.of_prompt(self._tokens, self._prompt, event.logprobs)
            case Chunk():
                message = self._messages[event.choice]
                message.take(self._pieces(event))
                message.logprobs += self._logprobs(event)
            case Finished():
                message = self._messages[event.choice]
                message.take(self._rest(event.choice))
                message.end = self._reason(event)
                self._usage.count(0, event)

    def body(self) -> dict[str, Any]:
        """The answer."""
        body = self._head.fields("chat.completion")
        body["choices"] = [self._choice(index, message) for index, message in sorted(self._messages.items())]
        body["usage"] = self._usage.fields()
        if self._prompt_logprobs is not None:
            body["prompt_logprobs"] = self._prompt_logprobs
        return body

    def _choice(self, index: int, message: _Message) -> dict[str, Any]:
        text = "".join(message.text)
        said: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if message.calls:
            said["content"] = text or None
            said["tool_calls"] = [
                {"id": self._draw_id(), "type": "function", "function": {"name": name, "arguments": "".join(arguments)}}
                for name, arguments in message.calls
            ]
        told = {"content": message.logprobs, "refusal": None} if self._style.logprobs else None
        return {"index": index, "message": said, "logprobs": told, **message.end}


class ChatStream(_Choices):
    """Turns events into chunks."""

    def __init__(self, head: Head, tokens: Tokens, style: ChatStyle, draw_id: Callable[[], str]) -> None:
        super().__init__(head, tokens, style, draw_id)
        self._frames = Frames(head, "chat.completion.chunk", tells_usage=style.usage)
        self._begun: set[int] = set()
        self._plain = not (style.logprobs or style.calls)

    def take(self, event: Event) -> bytes:
        """The chunks that the next event makes; none of some."""
        match event:
            case Chunk() if self._plain and event.choice in self._begun:
                return self._text(event.choice, event.text) if event.text else b""
            case Chunk():
                return self._begin(event.choice) + self._told(event.choice, self._pieces(event), self._logprobs(event))
            case Finished():
                self._usage.count(0, event)
                begin = self._begin(event.choice)
                rest = self._told(event.choice, self._rest(event.choice), [])
                return begin + rest + self._delta(event.choice, {}, **self._reason(event))
            case Started():
                self._started(event)
        return b""

    def end(self) -> bytes:
        """What comes when all choices have ended."""
        return (self._frames.usage(self._usage.fields()) if self._style.usage else b"") + DONE

    def _begin(self, choice: int) -> bytes:
        if choice in self._begun:
            return b""
        self._begun.add(choice)
        return self._delta(choice, {"role": "assistant", "content": "", "refusal": None})

    def _told(self, choice: int, pieces: Sequence[Piece], found: list[dict[str, Any]]) -> bytes:
        """Pieces of an answer; the log-probabilities of all go with the first."""
        if found and not pieces:
            pieces = (Said(""),)
        chunks = b""
        for piece in pieces:
            chunks += self._delta(choice, self._piece(piece), found)
            found = []
        return chunks

    def _piece(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Said):
            return {"content": piece.text}
        if isinstance(piece, Called):
            function = {"name": piece.name, "arguments": ""}
            return {
                "tool_calls": [{"index": piece.index, "id": self._draw_id(), "type": "function", "function": function}]
            }
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}

    def _text(self, choice: int, text: str) -> bytes:
        """The same as _delta for a text alone, in a fraction of the time."""
        delta = f'{{"index":{choice},"delta":{{"content":{dumps(text)}}},"logprobs":null,"finish_reason":null}}'
        return self._frames.choice(delta)

    def _delta(self, choice: int, delta: dict[str, Any], found: Sequence[dict[str, Any]] = (), **end: Any) -> bytes:
        told = {"content": found, "refusal": None} if found else None
        values = {"index": choice, "delta": delta, "logprobs": told, "finish_reason": None, **end}
        return self._frames.choice(dumps(values))
