"""vLLM's side of the comparison: a script for vLLM's own environment, which has nothing of zipserve.

Takes requests as lines of JSON on stdin and answers each with one line on stdout: seconds of steps and of prompts.
Between two lines it waits for the next one, and its threads sleep.
"""

import argparse
import json
import os
import random
import sys
import time
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams

TOKEN_IDS = (100, 10_000)
"""Prompts are drawn from these, which every vocabulary has."""


class Requests:
    """Requests to an engine in this process, by its public interface."""

    def __init__(self, engine: Any, context_tokens: int, vocab_tokens: int) -> None:
        self._engine = engine
        self._context_tokens = context_tokens
        self._vocab_tokens = vocab_tokens
        self._random = random.Random(0)  # noqa: S311  not for secrets
        self._added = 0
        self._running: list[str] = []

    def hold(self, count: int, context: int) -> None:
        """Adds requests until `count` are running, past their prompts."""
        while len(self._running) < count:
            self._running.append(self._add(context, self._context_tokens - context))
        while len(self._engine.step()) < count:
            pass

    def steps(self, count: int) -> list[float]:
        """Seconds of each step."""
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            outputs = self._engine.step()
            seconds.append(time.perf_counter() - started)
            if len(outputs) != len(self._running):
                raise RuntimeError(f"a step gave {len(outputs)} tokens to {len(self._running)} requests")
        return seconds

    def drop(self) -> None:
        """Ends all requests."""
        self._engine.abort_request(self._running)
        self._running = []
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def prefill(self, tokens: int) -> float:
        """Seconds of one prompt and its first token."""
        self._add(tokens, 1)
        started = time.perf_counter()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - started

    def _add(self, tokens: int, new_tokens: int) -> str:
        """A request whose prompt was never seen, so that the prefix cache does not know it."""
        self._added += 1
        last = min(TOKEN_IDS[1], self._vocab_tokens)
        ids = [self._random.randrange(min(TOKEN_IDS[0], last - 1), last) for _ in range(tokens)]
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._added), {"prompt_token_ids": ids}, params)
        return str(self._added)


def build(options: argparse.Namespace) -> Requests:
    """Loads and compiles the model."""
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=options.model,
            dtype="float32",
            distributed_executor_backend="uni",
            enable_prefix_caching=True,
            block_size=128,
            max_num_seqs=options.rows,
            max_model_len=options.context,
            max_num_batched_tokens=options.chunk,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
    )
    return Requests(engine, options.context, engine.model_config.get_vocab_size())


def main() -> None:
    """Serves until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    for name in ("--rows", "--context", "--chunk"):
        parser.add_argument(name, type=int, required=True)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    requests = build(parser.parse_args())
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(requests, name)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
