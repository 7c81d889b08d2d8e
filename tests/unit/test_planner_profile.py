"""Profiles of workers: their file, what is refused, and those of devices that nobody measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.layout import CODECS, Layout
from zipserve.planner.native.profile import (
    Hardware,
    Link,
    RoleProfile,
    WorkerProfile,
    as_document,
    load,
    parse,
    save,
)
from zipserve.planner.native.roofline import BANDWIDTH_SHARE, COMPUTE_SHARE, DataSheet, roofline
from zipserve.planner.native.step_model import StepModel, step_ms

LAYOUT = Layout("a-model", "0123", layers=30, kv_heads=3, key_dim=64, value_dim=64, dtype="float32", codec="zip-4/32")
STEP = StepModel(
    5.0, np.array([0.0, 64.0]), np.array([0.3, 0.6]), 2e-4, np.array([0.0, 8.0]), np.array([0.5, 1.5]), 1e-3
)
PREFILL = RoleProfile(STEP, ("tokens", "pairs"), 256, 32, 256, 64, 1_000, 0.02, 0.06, 0.01, 0.02)
PROFILE = WorkerProfile(
    hardware=Hardware("cpu-1", 1, "checkpoint", 1),
    layout=LAYOUT,
    parameters=134_515_008,
    heads=9,
    roles={"prefill": PREFILL},
    link=Link(2e9, 3.5),
    overhead_ms=4.0,
    measured=True,
    made_at="2026-11-01T12:00:00Z",
)
SHEET = DataSheet("a-gpu", 1e15, 4e12, 100e9, 50e9)

amounts = st.floats(0, 1e6)


@st.composite
def curves(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    knots = sorted(draw(st.sets(st.integers(1, 10_000), max_size=6)))
    slopes = draw(st.lists(amounts, min_size=len(knots) + 1, max_size=len(knots) + 1))
    return np.array([0.0, *knots]), np.array(slopes)


@st.composite
def profiles(draw: st.DrawFn) -> WorkerProfile:
    step = StepModel(draw(amounts), *draw(curves()), draw(amounts), *draw(curves()), draw(amounts))
    link = draw(st.none() | st.builds(Link, st.floats(1, 1e12), amounts))
    part = replace(PREFILL, step=step, slots=draw(st.integers(1, 100)), error_p50=draw(st.floats(0, 9)))
    layout = replace(LAYOUT, codec=draw(st.sampled_from(CODECS)), model=draw(st.text(max_size=5)))
    return replace(
        PROFILE, layout=layout, roles={"decode": part}, link=link, overhead_ms=draw(st.none() | amounts), measured=False
    )


@given(profiles())
def test_a_file_says_everything(profile: WorkerProfile) -> None:
    again = parse(json.loads(json.dumps(as_document(profile))))
    assert as_document(again) == as_document(profile)
    assert again.layout.fingerprint == profile.layout.fingerprint
    work = (300.0, 7e3, 17.0, 9e3)
    assert step_ms(again.roles["decode"].step, *work) == step_ms(profile.roles["decode"].step, *work)


def test_a_profile_is_saved_and_loaded(tmp_path: Path) -> None:
    save(PROFILE, tmp_path / "profile.json")
    assert as_document(load(tmp_path / "profile.json")) == as_document(PROFILE)
    with pytest.raises(InvalidRequestError, match=r"none\.json: .*No such file"):
        load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InvalidRequestError, match=r"broken\.json: "):
        load(tmp_path / "broken.json")


def changed(*path: str, value: Any) -> Any:
    """The document of the profile, with another value at a place."""
    document = json.loads(json.dumps(as_document(PROFILE)))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


STEP_PLACE = ("roles", "prefill", "step")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "a profile of version None, this reads version 1"),
        (changed("version", value=2), "a profile of version 2, this reads version 1"),
        (changed("surprise", value=1), "profile: 'surprise' is unknown"),
        (changed("link", "speed", value=1), r"profile\.link: 'speed' is unknown"),
        (changed("roles", value=[]), r"profile\.roles: \[\] is no object"),
        (changed("roles", "router", value=as_document(PROFILE)["roles"]["prefill"]), "roles: 'router' is none of"),
        (changed("parameters", value=1.5), r"profile\.parameters: 1.5 is not a whole number"),
        (changed("parameters", value=True), r"profile\.parameters: True is not a whole number"),
        (changed("measured", value=1), r"profile\.measured: 1 is not true or false"),
        (changed("overhead_ms", value=float("nan")), r"profile\.overhead_ms: nan is not a finite number"),
        (changed("layout", "codec", value="gzip"), r"profile\.layout: codec 'gzip' is unknown"),
        (changed("link", "bytes_per_s", value=0), "link: 0 bytes/s and 3.5 ms cannot be"),
        (changed(*STEP_PLACE, "pair_ms", value=-1), r"roles\.prefill\.step\.pair_ms: -1 ms, must be 0 or more"),
        (changed(*STEP_PLACE, "row_slopes", value=[1, -2]), r"step\.row_slopes: -2, none may be below 0"),
        (changed(*STEP_PLACE, "row_slopes", value=[1]), r"step\.row_knots: 2 knots with 1 slopes"),
        (changed(*STEP_PLACE, "token_knots", value=[0, 0]), r"step\.token_knots: .* must rise from 0"),
        (changed("roles", "prefill", "slots", value=0), r"roles\.prefill\.slots: 0, must be at least 1"),
        (changed("roles", "prefill", "terms", value=["luck"]), r"roles\.prefill\.terms: 'luck' is none of"),
    ],
)
def test_what_cannot_be_is_refused_by_its_place(document: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse(document)


def test_a_missing_field_is_named() -> None:
    for name in as_document(PROFILE):
        document = as_document(PROFILE)
        del document[name]
        with pytest.raises(InvalidRequestError, match=f"'{name}' is missing" if name != "version" else "version None"):
            parse(document)


def test_a_role_is_given_only_with_what_it_needs() -> None:
    assert PROFILE.role("prefill") is PREFILL
    with pytest.raises(InvalidRequestError, match="has no decode workers, only prefill"):
        PROFILE.role("decode")
    decoding = replace(PROFILE, roles={"decode": replace(PREFILL, terms=("rows", "context"))})
    assert decoding.role("decode").slots == 32
    with pytest.raises(InvalidRequestError, match="does not know what tokens, pairs cost a decode worker"):
        decoding.role("decode", mixes=True)


def test_a_device_that_nobody_measured() -> None:
    found = roofline(SHEET, PROFILE, "2026-11-01T12:00:00Z")
    assert not found.measured
    assert parse(as_document(found)).hardware.device == "a-gpu"
    for role in found.roles.values():
        weights_ms = 2 * PROFILE.parameters / (BANDWIDTH_SHARE * 4e12) * 1e3
        assert step_ms(role.step, 0, 0, 1, 0) == pytest.approx(weights_ms), "one row only reads the weights"
        many = 100_000
        compute_ms = 2 * PROFILE.parameters * many / (COMPUTE_SHARE * 1e15) * 1e3
        assert step_ms(role.step, many, 0, 0, 0) == pytest.approx(compute_ms), "many tokens compute all the time"


def test_a_model_that_does_not_fit_a_device() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"0\.27 GB of weights and a block of .* do not fit into 90% of 0\.10 GB"
    ):
        roofline(replace(SHEET, memory_bytes=1e8), PROFILE, "now")
    with pytest.raises(InvalidRequestError, match="bytes_per_s 0 is no number above 0"):
        roofline(replace(SHEET, bytes_per_s=0.0), PROFILE, "now")
