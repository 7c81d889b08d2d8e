"""What the device does for the sequences of a decode worker: a step of all, or one that makes room. In its thread."""

from zipserve.common.errors import ZipserveError
from zipserve.common.steps import Step, pairs_of
from zipserve.decode.checkpoints import Checkpoints
from zipserve.decode.stream import Stream
from zipserve.engine.device import Device
from zipserve.engine.logprobs import prompt_logprobs
from zipserve.engine.parking import ParkedKv, park, restore
from zipserve.engine.sampling import Drawn, draw

Turn = tuple[Stream, int]
"""A stream of a step, and how many of its tokens are computed."""
Outcome = Drawn | ZipserveError | None
"""Of one stream of a step: its next token, or why it failed; None: its prompt goes on."""


def step_of(turns: list[Turn]) -> Step:
    """What will be in a step of these turns; how long it takes is not known yet."""
    chunks = [(stream.sequence.length, count) for stream, count in turns if stream.left]
    contexts = [stream.sequence.length + 1 for stream, _ in turns if not stream.left]
    pairs = sum(pairs_of(before, count) for before, count in chunks)
    return Step(sum(count for _, count in chunks), pairs, len(contexts), sum(contexts), 0.0)


class Batch:
    """Of one worker."""

    def __init__(self, device: Device, checkpoints: Checkpoints) -> None:
        self._device = device
        self._checkpoints = checkpoints

    def step(self, turns: list[Turn]) -> list[Outcome]:
        """Computes the tokens of all turns, seals the blocks that they fill, and draws the next tokens."""
        streams = [stream for stream, _ in turns]
        for stream in streams:
            self._open(stream)
        for stream, count in turns:
            if stream.left <= count:  # it will draw
                stream.continuation.sampling.look_ahead(self._device.beside)
        starts = [stream.sequence.length for stream in streams]
        step = self._device.engine.forward([stream.next_tokens(count) for stream, count in turns])
        for i, rows in step.every.items():
            top = streams[i].continuation.sampling.params.prompt_logprobs or 0
            streams[i].prompt_logprobs += prompt_logprobs(rows, streams[i].continuation.prompt, starts[i], top)
        outcomes: list[Outcome] = [step.failed.get(i) for i in range(len(turns))]
        for stream, failed in zip(streams, outcomes, strict=True):
            if failed is None:
                self._checkpoints.seal(stream)
        last = [i for i, stream in enumerate(streams) if not stream.left and outcomes[i] is None]
        samplers = [streams[i].continuation.sampling for i in last]
        positions = [streams[i].first_position + streams[i].generated for i in last]
        for i, drawn in zip(last, draw(step.logits[last], samplers, positions), strict=True):
            outcomes[i] = drawn
        return outcomes

    def park(self, stream: Stream) -> ParkedKv:
        """Copies the KV of a sequence out of the cache."""
        self._open(stream)
        return park(self._device.cache, stream.sequence)

    def _open(self, stream: Stream) -> None:
        """Fills the open block of a stream that has just come: from its tail, or from where it was parked."""
        tails = stream.ticket.slabs.tails
        if stream.parked is not None:
            restore(self._device.cache, stream.parked, stream.sequence)
        elif tails:
            open_tokens = stream.sequence.length % self._device.layout.block_tokens
            self._device.cache.unpack_tail(tails[0], open_tokens, stream.sequence.slot)
