"""API keys: what a file may say, who is let in, and that a broken file changes nothing. Real files."""

import json
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from zipserve.cli.__main__ import main
from zipserve.common import api_keys
from zipserve.common.errors import InvalidRequestError, UnauthenticatedError
from zipserve.router.access.keyring import KeyRing
from zipserve.router.access.keys import parse
from zipserve.router.caller import ANYBODY, Caller

ALICE, BOB = api_keys.draw(), api_keys.draw()


def bearer(key: str) -> str:
    return f"Bearer {key}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.jsonl"
    path.write_text(f"# ours\n\n{api_keys.line(ALICE, 'alice', cache_salt='a', priority_max=1, requests_max=2)}\n")
    return path


def test_who_has_a_key_is_known(file: Path) -> None:
    ring = KeyRing(file)
    caller = Caller("alice", "a", 1, 2)
    assert ring.authenticate(bearer(ALICE)) == caller
    assert ring.authenticate(f"bearer   {ALICE} ") == caller
    assert ring.caller([("x", "y"), ("authorization", bearer(ALICE))]) == caller


@pytest.mark.parametrize(
    "header", [None, "", ALICE, "Bearer", "Bearer ", f"Basic {ALICE}", bearer(BOB), "Bearer é\ud800"]
)
def test_who_has_none_is_refused(file: Path, header: str | None) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        KeyRing(file).authenticate(header)
    assert ALICE not in caught.value.message
    assert BOB not in caught.value.message


def test_without_a_file_anybody_may_call() -> None:
    assert KeyRing(None).authenticate(None) is ANYBODY


def test_a_key_expires(file: Path) -> None:
    now_s = 0.0
    file.write_text(api_keys.line(ALICE, "alice", expires_at="1970-01-01T01:00:10+01:00"))
    ring = KeyRing(file, now=lambda: now_s)
    ring.authenticate(bearer(ALICE))
    now_s = 10.0
    with pytest.raises(UnauthenticatedError, match="'alice' has expired"):
        ring.authenticate(bearer(ALICE))


GOOD = json.loads(api_keys.line(BOB, "bob"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no key in it"),
        ("# nothing\n", "no key in it"),
        (f"{json.dumps(GOOD)}\n{BOB}", "line 2 is not JSON"),
        (json.dumps({**GOOD, "name": "a b"}), "line 1: name: "),
        (json.dumps({**GOOD, "sha256": BOB}), "line 1: sha256: "),
        (json.dumps({**GOOD, "requests_max": 0}), "greater than or equal to 1"),
        (json.dumps({**GOOD, "expires_at": "2030-01-31T12:00:00"}), "needs a time zone"),
        (json.dumps({**GOOD, BOB: 1}), "an unknown field"),
        (json.dumps([BOB]), "line 1: "),
        ("[" * 100_000, "line 1 is no JSON that can be read"),
        ("9" * 5000, "line 1 is no JSON that can be read"),
        (f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}", "line 2: the name or key of 'bob' stands there twice"),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(text)
    assert says in caught.value.message
    assert BOB not in caught.value.message, "not even by mistake"
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=r"keys file .* is wrong"):
        KeyRing(path)


def test_a_missing_file_keeps_the_router_from_starting(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read: No such file"):
        KeyRing(tmp_path / "none")


def test_keys_come_and_go(file: Path) -> None:
    ring = KeyRing(file)
    file.write_text(api_keys.line(BOB, "bob"))
    ring.refresh()
    assert ring.authenticate(bearer(BOB)).name == "bob"
    with pytest.raises(UnauthenticatedError):
        ring.authenticate(bearer(ALICE))


def test_a_broken_file_keeps_the_last_good_keys(file: Path) -> None:
    ring = KeyRing(file)
    for break_it in (lambda: file.write_text(""), lambda: file.write_text("{"), file.unlink):
        break_it()
        with capture_logs() as logs:
            ring.refresh()
            ring.refresh()
        assert [(line["event"], line["log_level"], line["kept"]) for line in logs] == [("keys.unreadable", "error", 1)]
        assert ring.authenticate(bearer(ALICE)).name == "alice"
    file.write_text(api_keys.line(BOB, "bob"))
    ring.refresh()
    assert ring.authenticate(bearer(BOB)).name == "bob"


def test_a_kubernetes_secret_is_swapped_by_its_link(tmp_path: Path) -> None:
    for name, key in (("..1", ALICE), ("..2", BOB)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(api_keys.line(key, "same"))
        os.utime(tmp_path / name / "keys", (1, 1))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys").symlink_to("..data/keys")
    ring = KeyRing(tmp_path / "keys")
    ring.authenticate(bearer(ALICE))
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    ring.refresh()
    assert ring.authenticate(bearer(BOB)).name == "same"


def test_keys_new(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["keys", "new", "--name", "team-a", "--requests-max", "3", "--expires-at", "2130-01-31T12:00:00Z"]) == 0
    shown = capsys.readouterr()
    key = shown.err.split()[-1]
    (tmp_path / "keys").write_text(shown.out)
    assert KeyRing(tmp_path / "keys").authenticate(bearer(key)) == Caller("team-a", "team-a", None, 3)
    assert key not in shown.out
    assert len(key) > 40
