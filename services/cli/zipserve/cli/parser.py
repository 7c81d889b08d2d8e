"""The options of every command. Imports nothing that costs start-up time."""

import argparse

from zipserve.cli.plan import SERVICES, parse_override
from zipserve.common.kv.layout import CODECS, DEFAULT_CODEC

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_HTTP_ADDRESS = "127.0.0.1:8000"
DEFAULT_PROMPT = "What is the capital of France?"


def build() -> argparse.ArgumentParser:
    """The parser; its result has `command`, the name of the command's module."""
    parser = argparse.ArgumentParser("zipserve", description="LLM serving with prefill and decode on separate workers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_up(commands.add_parser("up", help="run a whole stack on this machine"))
    generate = commands.add_parser("generate", help="send one prompt and stream the answer")
    generate.add_argument("prompt", metavar="PROMPT", help="what to ask; - reads stdin")
    generate.add_argument("--raw", action="store_true", help="send plain text, without the model's chat template")
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    generate.add_argument("--n", type=_count, default=1, metavar="N", help="answers to generate (default: 1)")
    generate.add_argument(
        "--logprobs", type=_tops, metavar="K", help="tell log-probabilities, and those of the K likeliest, with --json"
    )
    generate.add_argument("--prompt-logprobs", type=_tops, metavar="K", help="the same for the prompt's tokens")
    _add_generation(generate)
    chat = commands.add_parser("chat", help="talk with the model")
    chat.set_defaults(n=1, logprobs=None, prompt_logprobs=None)
    _add_generation(chat)
    _add_top(commands.add_parser("top", help="watch the processes of a cluster"))
    bench = commands.add_parser("bench", help="run a benchmark; without a name, list them")
    bench.add_argument("name", nargs="?", metavar="NAME", help="which one")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="its own options; try NAME --help")
    _add_keys(commands.add_parser("keys", help="make API keys for the router"))
    for name, module, help_text in (
        ("plan", "zipserve.planner", "find the best placement for a model, a workload and limits"),
        ("profile", "zipserve.planner.profiling", "learn how fast the workers of a running cluster are"),
    ):
        # what is no option here is left to the planner, also what looks like one; the module `plan` is another matter
        planner = commands.add_parser(name, prefix_chars="\0", add_help=False, help=help_text)
        planner.add_argument("arguments", nargs=argparse.REMAINDER)
        planner.set_defaults(command="planner", module=module)
    commands.add_parser("version", help="show the versions of zipserve and of what it runs on")
    return parser


def _add_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefill", type=_count_or_none, default=1, metavar="N",
        help="prefill workers (default: 1); 0: the decode workers compute all prompts themselves",
    )  # fmt: skip
    parser.add_argument("--decode", type=_count, default=1, metavar="M", help="decode workers (default: 1)")
    parser.add_argument("--model", help="folder or Hugging Face id (default: SmolLM2-135M-Instruct, converted once)")
    parser.add_argument("--redis", metavar="URL", help="Redis to use (default: start one)")
    parser.add_argument("--cluster", metavar="NAME", help="name of this stack in Redis (default: drawn)")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", type=_address,
        help=f"where the router listens; port 0 takes a free one (default: {DEFAULT_ADDRESS}; with --once a free port)",
    )  # fmt: skip
    parser.add_argument(
        "--http", metavar="HOST:PORT", type=_address,
        help=f"where the OpenAI-compatible API listens (default: {DEFAULT_HTTP_ADDRESS}, or a free port if taken; "
        "with --once nowhere)",
    )  # fmt: skip
    parser.add_argument("--threads", type=_count, metavar="T", help="CPU threads per worker (default: share all cores)")
    parser.add_argument(
        "--codec", choices=CODECS, metavar="C",
        help=f"how KV blocks are coded: {', '.join(CODECS)} (default: {DEFAULT_CODEC})",
    )  # fmt: skip
    parser.add_argument("--kv-blocks", type=_count, metavar="B", help="KV blocks per worker (default: the workers')")
    parser.add_argument(
        "--set", type=_override, action="append", default=[], dest="overrides", metavar="SERVICE.FIELD=VALUE",
        help=f"any setting of a service ({', '.join(SERVICES)}); may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--start-timeout", type=_seconds, default=300.0, metavar="S", help="longest start-up (default: 300)"
    )
    parser.add_argument(
        "--drain", type=_seconds, default=10.0, metavar="S", help="longest wait for running requests at the end"
    )
    parser.add_argument("--log-dir", metavar="DIR", help="where the processes log (default: a temporary folder)")
    parser.add_argument("--once", action="store_true", help="answer one prompt, print measurements, stop")
    parser.add_argument("--prompt", help=f"what --once asks (default: {DEFAULT_PROMPT})")
    parser.add_argument("--max-tokens", type=_count, metavar="N", help="most tokens of its answer (default: 64)")


def _add_top(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--log-dir", metavar="DIR", help="the log folder of a stack that zipserve up runs")
    where.add_argument(
        "--metrics", type=_address, action="append", default=[], metavar="HOST:PORT",
        help="a service's metrics, without a registry; may be repeated",
    )  # fmt: skip
    parser.add_argument("--redis", metavar="URL", help="Redis of the cluster (default: ZIPSERVE_TOP_REDIS_URL)")
    parser.add_argument("--cluster", metavar="NAME", help="name of the cluster in Redis (default: default)")
    parser.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="S", help="time between two looks (default: 2)"
    )
    parser.add_argument("--once", action="store_true", help="look twice, tell, and stop")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a screen")


def _add_keys(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="draw a key; it is shown once, and its line for the keys file")
    new.add_argument("--name", required=True, help="whose key it is, in logs and metrics")
    new.add_argument(
        "--cache-salt", metavar="SALT", help="share KV only with keys of the same salt (default: its name)"
    )
    new.add_argument("--priority-max", type=int, metavar="P", help="highest priority of its requests (default: any)")
    new.add_argument("--requests-max", type=_count, metavar="N", help="most requests in flight (default: no limit)")
    new.add_argument("--expires-at", metavar="TIME", help="as in 2030-01-31T12:00:00Z (default: never)")


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help=f"host:port of the router ({DEFAULT_ADDRESS})")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with the key for the router, where it wants one")
    parser.add_argument("--tls", action="store_true", help="the router speaks TLS, as with any of the next four")
    parser.add_argument(
        "--tls-name", default="", metavar="NAME", help="in its certificate (default: the address's host)"
    )
    parser.add_argument("--tls-roots", metavar="PEM", help="authorities to check its certificate against")
    parser.add_argument("--tls-certificate", metavar="PEM", help="an own certificate, where the router wants one")
    parser.add_argument("--tls-key", metavar="PEM", help="its key")
    parser.add_argument("--model", default="", help="model id (default: the only one served)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=_count, metavar="N", help="most tokens to generate (default: what fits)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens (default: all)")
    parser.add_argument("--top-p", type=float, metavar="P", help="keep the smallest set that reaches P (default: all)")
    parser.add_argument("--min-p", type=float, metavar="P", help="keep tokens P times as likely as the likeliest one")
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="on tokens seen so far (default: 1)")
    parser.add_argument("--presence-penalty", type=float, metavar="P", help="on generated tokens (default: 0)")
    parser.add_argument("--frequency-penalty", type=float, metavar="F", help="for each time generated (default: 0)")
    parser.add_argument(
        "--logit-bias", type=_bias, action="append", default=[], metavar="ID=B",
        help="added to a token's logit; may be repeated",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="the same seed draws the same answer (default: drawn)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")
    parser.add_argument(
        "--stop-token-id", type=int, action="append", default=[], dest="stop_token_ids", metavar="ID",
        help="ends the answer; may be repeated",
    )  # fmt: skip
    parser.add_argument("--min-tokens", type=_count, default=0, metavar="N", help="tokens before which nothing ends it")
    parser.add_argument("--ignore-eos", action="store_true", help="go on at the model's end of sequence")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="longest time for an answer (default: no limit)")
    parser.add_argument("--stats", action="store_true", help="print measurements to stderr")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _tops(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID=BIAS") from None


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds above 0")
    return value


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HOST:PORT")
    return text


def _override(text: str) -> tuple[str, str, str]:
    try:
        return parse_override(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
