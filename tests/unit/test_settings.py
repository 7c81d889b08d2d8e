"""Settings of every service: command line over environment over defaults, and nothing unknown, unsafe or leaked."""

import os
from typing import Any

import pytest
from pydantic import ValidationError

from zipserve.common.settings import ServiceSettings
from zipserve.decode.config import DecodeSettings
from zipserve.kvstore.config import KvStoreSettings
from zipserve.prefill.config import PrefillSettings
from zipserve.router.config import RouterSettings

SECRET = "sixteen bytes or more"
CLASSES: list[type[ServiceSettings]] = [PrefillSettings, DecodeSettings, KvStoreSettings, RouterSettings]


def prefix_of(cls: type[ServiceSettings]) -> str:
    return str(cls.model_config.get("env_prefix"))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with the secrets only."""
    for name in list(os.environ):
        if name.upper().startswith("ZIPSERVE_"):
            monkeypatch.delenv(name)
    for cls in CLASSES:
        monkeypatch.setenv(f"{prefix_of(cls)}SECRET", SECRET)


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> type[ServiceSettings]:
    chosen: type[ServiceSettings] = request.param
    return chosen


def test_prefixes_do_not_overlap() -> None:
    prefixes = [prefix_of(cls) for cls in CLASSES]
    assert prefixes == ["ZIPSERVE_PREFILL_", "ZIPSERVE_DECODE_", "ZIPSERVE_KVSTORE_", "ZIPSERVE_ROUTER_"]


def test_defaults_are_enough_beside_the_secret(cls: type[ServiceSettings]) -> None:
    settings = cls.load([])
    assert settings.secret.get_secret_value() == SECRET
    assert settings.listen.startswith("127.0.0.1:"), "nothing is open to the network unless it is asked for"
    assert settings.worker_id != cls.load([]).worker_id, "two processes without a name would be taken for one"


def test_command_line_over_environment_over_default(
    cls: type[ServiceSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cls.load([]).drain_s == 30.0
    monkeypatch.setenv(f"{prefix_of(cls)}DRAIN_S", "7")
    assert cls.load([]).drain_s == 7.0
    assert cls.load(["--drain-s", "8"]).drain_s == 8.0
    assert cls.load(["--drain-s=9"]).drain_s == 9.0


def test_the_process_s_own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["prefill", "--worker-id", "p7", "--lease-ttl-s=3"])
    settings = PrefillSettings.load()
    assert (settings.worker_id, settings.lease_ttl_s) == ("p7", 3.0)


def test_another_service_s_environment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPSERVE_DECODE_DRAIN_S", "7")
    monkeypatch.setenv("ZIPSERVE_DECODE_NONSENSE", "7")
    assert PrefillSettings.load([]).drain_s == 30.0


@pytest.mark.parametrize("name", ["DRAIN", "DRAINS", "drain", "Drain_s_"])
def test_unknown_name_in_the_environment(
    name: str, cls: type[ServiceSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{prefix_of(cls)}{name}", "7")
    with pytest.raises(SystemExit, match=f"unknown settings in the environment: {prefix_of(cls)}{name}"):
        cls.load([])


def test_unknown_name_in_the_environment_in_lower_case(
    cls: type[ServiceSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are read in any case, so unknown ones are found in any case."""
    monkeypatch.setenv(f"{prefix_of(cls)}DRAIN_S".lower(), "7")
    assert cls.load([]).drain_s == 7.0
    monkeypatch.setenv(f"{prefix_of(cls)}DRAIN".lower(), "7")
    with pytest.raises(SystemExit, match="unknown settings"):
        cls.load([])


@pytest.mark.parametrize("argument", ["--drain", "--drain_s=1", "extra", "-x"])
def test_unknown_name_on_the_command_line(
    argument: str, cls: type[ServiceSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        cls.load([argument])
    assert raised.value.code not in (0, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("drain_s", "-1"),
        ("drain_s", "soon"),
        ("drain_s", "nan"),
        ("drain_s", "inf"),
        ("heartbeat_s", "0"),
        ("heartbeat_s", "inf"),
        ("heartbeat_s", "2"),  # with a time to live of 5 s, one late heartbeat would make a worker vanish
        ("registry_ttl_s", "0"),
        ("registry_ttl_s", "1"),
        ("metrics_port", "70000"),
        ("cluster", ""),
        ("cluster", "a:b"),
        ("cluster", "x" * 65),
        ("worker_id", "a/b"),
        ("worker_id", "a b"),
        ("message_bytes_max", "1"),
        ("log_level", "loud"),
        ("log_format", "xml"),
        ("listen", "127.0.0.1"),
        ("listen", ":50051"),
        ("listen", "127.0.0.1:http"),
        ("listen", "127.0.0.1:65536"),
    ],
)
def test_values_out_of_range(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ZIPSERVE_KVSTORE_{name.upper()}", value)
    with pytest.raises(ValidationError, match=name):
        KvStoreSettings.load([])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_tokens", "8"),
        ("block_tokens", "24"),
        ("kv_blocks", "0"),
        ("kv_tails", "0"),
        ("sequences_max", "0"),
        ("queue_requests_max", "0"),
        ("threads", "-1"),
        ("dtype", "int8"),
        ("codec", "zap"),
        ("lease_ttl_s", "0"),
        ("lease_ttl_s", "inf"),
        ("step_tokens", "-1"),
        ("deadline_default_s", "0"),
        ("deadline_default_s", "inf"),
    ],
)
def test_worker_values_out_of_range(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ZIPSERVE_PREFILL_{name.upper()}", value)
    with pytest.raises(ValidationError, match=name):
        PrefillSettings.load([])


@pytest.mark.parametrize("secret", ["", "short-secret", "x" * 15, "ü" * 7])
def test_a_short_secret_is_refused_and_not_repeated(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPSERVE_PREFILL_SECRET", secret)
    with pytest.raises(ValidationError, match=f"at least 16 bytes, has {len(secret.encode())}") as raised:
        PrefillSettings.load([])
    assert not secret or secret not in str(raised.value), "a log would keep it"


def test_the_secret_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZIPSERVE_PREFILL_SECRET")
    with pytest.raises(ValidationError, match="secret"):
        PrefillSettings.load([])


def test_sixteen_bytes_are_counted_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPSERVE_PREFILL_SECRET", "ü" * 8)
    assert PrefillSettings.load([]).secret.get_secret_value() == "ü" * 8


def test_the_secret_is_not_printed(cls: type[ServiceSettings]) -> None:
    settings = cls.load([])
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)


def test_settings_cannot_be_changed(cls: type[ServiceSettings]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        cls.load([]).drain_s = 1.0  # this is what must fail


def test_unknown_names_from_code() -> None:
    arguments: dict[str, Any] = {"secret": SECRET, "drain": 1}
    with pytest.raises(ValidationError, match="drain"):
        KvStoreSettings(**arguments)


@pytest.mark.parametrize(
    ("listen", "advertise", "expected"),
    [
        ("127.0.0.1:0", "", "127.0.0.1:5000"),
        ("127.0.0.1:77", "prefill-0.prefill", "prefill-0.prefill:5000"),
        ("[::1]:0", "", "[::1]:5000"),
        ("0.0.0.0:0", "10.1.2.3", "10.1.2.3:5000"),
    ],
)
def test_advertised_address(listen: str, advertise: str, expected: str) -> None:
    settings = KvStoreSettings(secret=SECRET, listen=listen, advertise_host=advertise)  # type: ignore[arg-type]
    assert settings.advertised(5000) == expected


def test_help_names_every_setting(cls: type[ServiceSettings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cls.load(["--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for name in cls.model_fields:
        assert f"--{name.replace('_', '-')}" in text
