"""`zipserve generate`: sends one prompt and streams the answer to stdout."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence

from zipserve.cli.answer import Answer
from zipserve.cli.client import Client, Message, Stream
from zipserve.common.errors import OverloadedError, WorkerLostError, ZipserveError


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.raw and options.system:
        sys.stderr.write("zipserve: --system needs the chat template that --raw turns off\n")
        return 2
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    prompt = text if options.raw else conversation(options.system, text)
    answer = Answer(time.monotonic())
    with Client(options.address) as client:
        try:
            with ask(client, prompt, options) as stream:
                receive(stream, answer, _ignore if options.json else write)
        except ZipserveError as error:
            if answer.text and not options.json:
                write("\n")
            sys.stderr.write(explain(error) + "\n")
            return 1
    if options.json:
        print(json.dumps(answer.as_json()))
    elif not answer.text.endswith("\n"):
        write("\n")
    if options.stats:
        sys.stderr.write("\n".join(answer.statistics()) + "\n")
    return 0


def conversation(system: str | None, text: str) -> list[Message]:
    """A conversation of one turn."""
    return [*([Message("system", system)] if system else []), Message("user", text)]


def ask(client: Client, prompt: str | Sequence[Message], options: argparse.Namespace) -> Stream:
    """Starts an answer with the command line's parameters."""
    return client.generate(
        prompt,
        model=options.model,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=dict(options.logit_bias),
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        stop=options.stop,
        stop_token_ids=options.stop_token_ids,
        min_tokens=options.min_tokens,
        ignore_eos=options.ignore_eos,
        timeout_s=options.timeout,
    )


def receive(stream: Stream, answer: Answer, show: Callable[[str], None]) -> None:
    """Takes in a whole answer and shows its text as it comes.

    Raises:
        ZipserveError: the call failed; `answer` has what came before.
    """
    for event in stream:
        text = answer.add(event, time.monotonic())
        if text:
            show(text)


def write(text: str) -> None:
    """To stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def explain(error: ZipserveError) -> str:
    """An error as one line."""
    line = f"zipserve: {error.reason}: {' '.join(error.message.split())}"
    if isinstance(error, OverloadedError):
        line += f"; try again in {error.retry_after_s:g} s"
    elif isinstance(error, WorkerLostError):
        line += " (is it running? `zipserve up` starts a stack on this machine)"
    return line


def _ignore(text: str) -> None:
    pass
