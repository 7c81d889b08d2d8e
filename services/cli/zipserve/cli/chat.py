"""`zipserve chat`: a conversation in the terminal."""

import argparse
import sys
import time

from zipserve.cli.answer import Answer
from zipserve.cli.generate import ask, connect, explain, receive, write
from zipserve.client import Client, Message
from zipserve.common.errors import ZipserveError

_HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C ends an answer."


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if sys.stdin.isatty():
        import readline  # noqa: F401, PLC0415  gives input() history and editing
    sys.stderr.write(_HELP + "\n")
    with connect(options) as client:
        chat = Chat(client, options)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                sys.stderr.write("\n")
                continue
            if line == "/quit":
                return 0
            chat.take(line)


class Chat:
    """The conversation so far."""

    def __init__(self, client: Client, options: argparse.Namespace) -> None:
        self._client = client
        self._options = options
        self.history: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.history = [Message("system", self._options.system)] if self._options.system else []

    def take(self, line: str) -> None:
        """Handles one line of the user."""
        if not line:
            return
        if line == "/reset":
            self.reset()
        elif line.startswith("/"):
            sys.stderr.write(_HELP + "\n")
        else:
            self._turn(line)

    def _turn(self, text: str) -> None:
        question = Message("user", text)
        answer = Answer(time.monotonic())
        try:
            with ask(self._client, [*self.history, question], self._options) as stream:
                receive(stream, [answer], write)
        except KeyboardInterrupt:
            write(" …")
        except ZipserveError as error:
            sys.stderr.write(("\n" if answer.text else "") + explain(error) + "\n")
            return  # the turn is forgotten, so that it can be tried again
        write("\n")
        if answer.text:
            self.history += [question, Message("assistant", answer.text)]
        if self._options.stats:
            sys.stderr.write("\n".join(answer.statistics()) + "\n")
