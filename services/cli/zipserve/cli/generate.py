"""`zipserve generate`: sends one prompt and streams the answer to stdout."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zipserve.cli.answer import Answer
from zipserve.client import Client, Message, Stream, Tls
from zipserve.common.errors import OverloadedError, WorkerLostError, ZipserveError


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.raw and options.system:
        sys.stderr.write("zipserve: --system needs the chat template that --raw turns off\n")
        return 2
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    prompt = text if options.raw else conversation(options.system, text)
    answers = [Answer(time.monotonic(), choice) for choice in range(options.n)]
    live = options.n == 1 and not options.json
    with connect(options) as client:
        try:
            with ask(client, prompt, options) as stream:
                receive(stream, answers, write if live else _ignore)
        except ZipserveError as error:
            if live and answers[0].text:
                write("\n")
            sys.stderr.write(explain(error) + "\n")
            return 1
    for answer in answers:
        _tell(answer, options, shown=live)
    return 0


def _tell(answer: Answer, options: argparse.Namespace, *, shown: bool) -> None:
    """Prints a whole answer, but for text that was shown as it came."""
    if options.json:
        print(json.dumps(answer.as_json()))
    else:
        if not shown:
            write(f"[{answer.choice}] {answer.text}")
        if not answer.text.endswith("\n"):
            write("\n")
    if options.stats:
        sys.stderr.write("\n".join(answer.statistics()) + "\n")


def connect(options: argparse.Namespace) -> Client:
    """A client for the command line's router.

    Raises:
        SystemExit: a file of the key or of TLS cannot be read.
    """
    files = (options.tls_roots, options.tls_certificate, options.tls_key)
    try:
        key = Path(options.api_key_file).read_text().strip() if options.api_key_file else ""
        tls = Tls.read(*files, options.tls_name) if options.tls or options.tls_name or any(files) else None
    except OSError as error:
        raise SystemExit(f"zipserve: {error}") from error
    return Client(options.address, api_key=key, tls=tls)


def conversation(system: str | None, text: str) -> list[Message]:
    """A conversation of one turn."""
    return [*([Message("system", system)] if system else []), Message("user", text)]


def ask(client: Client, prompt: str | Sequence[Message], options: argparse.Namespace) -> Stream:
    """Starts an answer with the command line's parameters."""
    return client.generate(
        prompt,
        model=options.model,
        n=options.n,
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


def receive(stream: Stream, answers: Sequence[Answer], show: Callable[[str], None]) -> None:
    """Takes in the answers of all choices, and shows text as it comes.

    Raises:
        ZipserveError: the call failed; `answers` have what came before.
    """
    for event in stream:
        now_s = time.monotonic()
        for answer in answers:
            if text := answer.add(event, now_s):
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
