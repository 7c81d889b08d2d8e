"""The pure parts of `zipserve up`: what is started with which settings, when it is started again, what is told."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.cli import parser, plan
from zipserve.cli.console import obituary, progress, summary
from zipserve.cli.lifecycle import Setup
from zipserve.cli.logtail import readable, tail
from zipserve.cli.restart import RestartPolicy, Restarts, describe_exit
from zipserve.cli.supervisor import Child, Death
from zipserve.cli.up import _tell_where, dial_address

SECRET = "s" * 32
REDIS_URL = "redis://:password@127.0.0.1:7/0"


def _stack(**changes: object) -> plan.Stack:
    values: dict[str, object] = {
        "prefill": 2, "decode": 1, "model": "a-model", "listen": "127.0.0.1:50051", "cluster": "test",
        "redis_url": REDIS_URL, "secret": SECRET, "drain_s": 10.0, **changes,
    }  # fmt: skip
    return plan.Stack(**values)  # type: ignore[arg-type]


@given(cores=st.integers(1, 512), workers=st.integers(1, 64))
def test_threads_are_shared_out_evenly(cores: int, workers: int) -> None:
    shares = plan.divide_threads(cores, workers)
    assert len(shares) == workers
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == max(cores, workers)
    assert shares == sorted(shares, reverse=True)


def test_the_codec_is_that_of_all_workers() -> None:
    children = plan.children(_stack(codec="int4", prefill=1), cores=2)
    assert {child.name for child in children if "--codec=int4" in child.command} == {"prefill-0", "decode-0"}


def test_children_of_a_stack() -> None:
    children = plan.children(_stack(), cores=8)
    assert [child.name for child in children] == ["router", "prefill-0", "prefill-1", "decode-0", "kvstore-0"]
    assert [child.stop_rank for child in children] == [0, 1, 1, 1, 2]
    prefill = children[1]
    assert prefill.command == (
        *(sys.executable, "-P", "-m", "zipserve.prefill"),
        *("--worker-id=prefill-0", "--cluster=test", "--drain-s=10", "--metrics-port=0"),
        *("--model=a-model", "--listen=127.0.0.1:0", "--threads=3"),
    )
    assert prefill.environment == {
        "ZIPSERVE_PREFILL_SECRET": SECRET,
        "ZIPSERVE_PREFILL_REDIS_URL": REDIS_URL,
        "OMP_NUM_THREADS": "3",
    }
    assert children[0].environment["OMP_NUM_THREADS"] == "1"
    assert {"--listen=127.0.0.1:50051", "--model=a-model"} < set(children[0].command)


def test_without_prefill_workers_the_decode_workers_compute_the_prompts() -> None:
    children = plan.children(_stack(prefill=0, decode=2), cores=4)
    assert [child.name for child in children] == ["router", "decode-0", "decode-1", "kvstore-0"]
    assert "--local-prefill-tokens-max=-1" in children[0].command
    assert all("--threads=2" in child.command for child in children[1:3])
    assert parser.build().parse_args(["up", "--prefill", "0"]).prefill == 0


def test_the_http_api_is_the_routers() -> None:
    with_http = plan.children(_stack(http_listen="127.0.0.1:8000"), cores=2)
    assert [c.name for c in with_http if "--http-listen=127.0.0.1:8000" in c.command] == ["router"]
    assert not [c.name for c in plan.children(_stack(), cores=2) if any("http" in word for word in c.command)]


def test_workers_take_given_sizes() -> None:
    children = plan.children(_stack(threads=5, kv_blocks=64), cores=8)
    workers = [child for child in children if child.role in ("prefill", "decode")]
    assert all({"--threads=5", "--kv-blocks=64"} < set(child.command) for child in workers)
    assert all(child.environment["OMP_NUM_THREADS"] == "5" for child in workers)
    assert not any("--kv-blocks=64" in child.command for child in children if child not in workers)


def test_an_override_wins_and_goes_to_its_service_only() -> None:
    overrides = (("decode", "drain_s", "1"), ("decode", "drain_s", "2"), ("router", "secret", "x" * 20))
    children = {child.name: child for child in plan.children(_stack(overrides=overrides), cores=2)}
    assert "--drain-s=2" in children["decode-0"].command
    assert sum(word.startswith("--drain-s") for word in children["decode-0"].command) == 1
    assert "--drain-s=10" in children["prefill-0"].command
    assert children["router"].environment["ZIPSERVE_ROUTER_SECRET"] == "x" * 20


@pytest.mark.parametrize("overrides", [(), (("prefill", "secret", SECRET), ("router", "redis_url", REDIS_URL))])
def test_no_secret_is_in_an_argument_or_a_repr(overrides: tuple[tuple[str, str, str], ...]) -> None:
    stack = _stack(overrides=overrides)
    children = plan.children(stack, cores=2)
    visible = " ".join(word for child in children for word in child.command) + repr(children)
    assert SECRET not in visible
    assert "password" not in visible
    assert SECRET not in repr(_stack())


def test_override_syntax() -> None:
    assert plan.parse_override("decode.kv-blocks=a=b") == ("decode", "kv_blocks", "a=b")
    assert plan.parse_override("router.advertise_host=") == ("router", "advertise_host", "")


@pytest.mark.parametrize("text", ["", "decode", "decode.kv_blocks", "decode=3", "decode.=3", "redis.port=3", "a.b=c"])
def test_bad_overrides_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"SERVICE\.FIELD=VALUE|no service"):
        plan.parse_override(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "--prefill", "-1"],
        ["up", "--decode", "0"],
        ["up", "--listen", "50051"],
        ["up", "--listen", "127.0.0.1:70000"],
        ["up", "--set", "nothing.field=1"],
        ["up", "--drain", "nan"],
        ["generate"],
        ["generate", "x", "--timeout", "-1"],
        ["generate", "x", "--logit-bias", "7"],
        [],
    ],
)
def test_bad_command_lines_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parser.build().parse_args(arguments)
    assert exit_.value.code == 2
    assert "usage: zipserve" in capsys.readouterr().err


def test_command_line_of_up() -> None:
    options: argparse.Namespace = parser.build().parse_args(
        ["up", "--prefill", "2", "--listen", "[::1]:0", "--set", "decode.codec=raw", "--set", "router.drain-s=1"]
    )
    assert (options.command, options.prefill, options.decode, options.listen) == ("up", 2, 1, "[::1]:0")
    assert options.overrides == [("decode", "codec", "raw"), ("router", "drain_s", "1")]


def test_parsing_imports_nothing_heavy() -> None:
    script = "import sys; from zipserve.cli import parser; parser.build(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-P", "-c", script], check=True, capture_output=True, text=True).stdout
    assert {"grpc", "google.protobuf", "pydantic", "redis", "asyncio", "torch"} & set(modules.split()) == set()


def test_the_client_needs_no_service_package() -> None:
    """`generate` and `chat` work with the distribution's own dependencies, without any extra."""
    script = "import sys; from zipserve.cli import chat, generate; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-P", "-c", script], check=True, capture_output=True, text=True).stdout
    assert {"pydantic", "redis", "structlog", "opentelemetry", "numpy", "torch"} & set(modules.split()) == set()


def test_restart_delays_double_until_given_up() -> None:
    restarts = Restarts(RestartPolicy(delay_first_s=1.0, delay_max_s=3.0, deaths_max=5))
    assert restarts.after_death(1.0, was_ready=True) == 1.0
    assert [restarts.after_death(1.0, was_ready=False) for _ in range(4)] == [2.0, 3.0, 3.0, None]
    assert restarts.deaths == 5


def test_a_long_life_clears_the_record() -> None:
    restarts = Restarts(RestartPolicy(delay_first_s=1.0, deaths_max=3, settled_s=30.0))
    assert [restarts.after_death(30.0, was_ready=True) for _ in range(9)] == [1.0] * 9
    assert restarts.after_death(29.9, was_ready=True) == 2.0
    assert restarts.after_death(29.9, was_ready=True) is None


def test_a_child_that_never_was_ready_is_given_up_early() -> None:
    restarts = Restarts(RestartPolicy(start_deaths_max=2, deaths_max=5))
    assert restarts.after_death(100.0, was_ready=False) is not None
    assert restarts.after_death(100.0, was_ready=False) is None


def test_exits_are_named() -> None:
    assert describe_exit(3) == "exited with status 3"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-63) == "was killed by signal 63"


def test_json_log_lines_become_short_text() -> None:
    entry = {
        "event": "service.failed", "level": "error", "timestamp": "t", "service": "x", "worker_id": "y", "port": 7,
        "exception": [{"exc_type": "ValueError", "exc_value": "bad", "frames": [{"locals": "long"}]}],
    }  # fmt: skip
    assert readable(json.dumps(entry)) == "error service.failed port=7 (ValueError: bad)"
    assert readable("Traceback (most recent call last):\n") == "Traceback (most recent call last):"
    assert readable("[1, 2]") == "[1, 2]"
    assert readable('{"no": "event"}') == '{"no": "event"}'
    assert len(readable("x" * 1000)) == 200


def test_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log, 0, 3) == []
    log.write_text("an earlier life\none\n\ntwo\nthree\n")
    assert tail(log, 16, 9) == ["one", "two", "three"]
    assert tail(log, 0, 2) == ["two", "three"]
    log.write_bytes(b"\xff" * 20_000 + b"\nlast\n")
    assert tail(log, 0, 9) == ["last"]


def test_what_the_console_tells() -> None:
    redis = Child(plan.ChildSpec("redis", "redis", ()), Path("/logs/redis.log"))
    router = Child(plan.ChildSpec("router", "router", ()), Path("/logs/router.log"))
    redis.address = "127.0.0.1:7"
    assert progress([redis, router], 3.2).split() == ["3", "s", "redis", "✓", "router…"]
    assert summary([redis, router])[1].split() == ["redis", "127.0.0.1:7", "–", "/logs/redis.log"]
    death = Death(router, 12, "exited with status 1", 2.0, ["boom"], 0.5)
    assert obituary(death)[:2] == [
        "router (pid 12) exited with status 1 after 2.0 s: starts again in 0.5 s",
        "  router | boom",
    ]


def test_wildcard_addresses_are_dialled_on_loopback() -> None:
    assert dial_address("0.0.0.0:5") == "127.0.0.1:5"
    assert dial_address("[::]:5") == "[::1]:5"
    assert dial_address("10.0.0.1:5") == "10.0.0.1:5"


def test_the_secret_of_a_stack_is_for_its_owner(tmp_path: Path) -> None:
    """Also where a file of an earlier run lies, or a link."""
    secret, other = tmp_path / "stack.json", tmp_path / "other"
    other.write_text("")
    for before in (lambda: secret.write_text("{}"), lambda: secret.symlink_to(other)):
        before()
        _tell_where(Setup(_stack(), None, tmp_path, 60.0, "127.0.0.1:1", "", None))
        assert secret.stat().st_mode & 0o077 == 0
        assert json.loads(secret.read_text())["secret"] == SECRET
        secret.unlink()
    assert other.read_text() == ""
