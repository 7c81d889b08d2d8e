"""What the planner reads: profiles, traces, distributions, devices; and what it prints."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import planner_cases as cases
from zipserve.cli import parser as cli_parser
from zipserve.cli.__main__ import main as cli_main
from zipserve.common.errors import InvalidRequestError
from zipserve.planner.__main__ import main
from zipserve.planner.command import parse_devices, read_profile
from zipserve.planner.latency import DISAGGREGATED, parse_profile
from zipserve.planner.trace import draw, read_trace
from zipserve.planner.workload import workload

DOCUMENT: dict[str, Any] = json.loads(cases.PROFILE_PATH.read_text())
TRACE = cases.DATA / "traces/sharegpt.csv"
OPTIONS = [
    *("--profile", str(cases.PROFILE_PATH), "--model", "facebook/opt-13b", "--trace", str(TRACE), "--requests", "300"),
    *("--slo-ttft", "250", "--slo-tpot", "100", "--separate", "--rate-max", "8"),
]


def test_a_profile_knows_its_device_and_instances() -> None:
    profile = read_profile(cases.PROFILE_PATH)
    assert profile.device == "a100"
    assert parse_profile({**DOCUMENT, "device": "a100-sxm"}, "x").device == "a100-sxm"
    instance = profile.model("facebook/opt-13b").instance(DISAGGREGATED, 2, 4)
    assert instance.devices == 8
    assert (instance.step.stages, instance.step.prefill_tokens_max) == (4, 744_224)


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        (("profiles",), {}, "profile.profiles: it has no model"),
        (("layers_heads",), [], r"profile.layers_heads: \[\] is no object"),
        (("layers_heads", "facebook/opt-13b"), [40], r"layers_heads.facebook/opt-13b: \[40\] are not 2 finite numbers"),
        (("profiles", "vllm", "facebook/opt-13b", "1", "prefill"), [1, 2], "vllm.facebook/opt-13b.1.prefill: "),
        (("profiles", "vllm", "facebook/opt-13b", "1", "prefill"), [1, 2, float("nan")], "are not 3 finite numbers"),
        (("profiles", "vllm", "facebook/opt-13b", "1", "prefill"), [0, 0, 0], "prefill: 0, 0 and 0 ms make steps of 0"),
        (("profiles", "vllm", "facebook/opt-13b", "1", "decoding_smallbs"), [9, -1, 2], "shorter with more work"),
        (("profiles", "vllm", "facebook/opt-13b", "1", "decoding_large_small_bs_threshold"), 0, "0 is no whole number"),
        (("profiles", "vllm", "facebook/opt-13b", "one"), {}, "'one' is no parallelism from 1 on"),
        (("max_num_tokens", "facebook/opt-13b", "1,1"), 1.5, "1.5 is no whole number from 1 on"),
        (("max_num_tokens", "facebook/opt-13b", "1"), 7, "'' is no parallelism"),
        (("max_num_tokens", "facebook/opt-13b"), None, "None is no object"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(place: tuple[str, ...], value: object, why: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    node = document
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(InvalidRequestError, match=why) as refused:
        parse_profile(document, "a100")
    assert refused.value.field == "profile"


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    profile = cases.profile()
    with pytest.raises(InvalidRequestError, match=r"no model 'gpt'; there are: facebook/opt-13b, facebook/opt-66b"):
        profile.model("gpt")
    with pytest.raises(InvalidRequestError, match="has 2 models, name one"):
        profile.model(None)
    with pytest.raises(InvalidRequestError, match="no step times for device 'h100'; the profile is of a100"):
        parse_devices("h100:8", profile)
    with pytest.raises(InvalidRequestError, match="no devices"):
        parse_devices("a100:0", profile)
    with pytest.raises(InvalidRequestError, match="not of the form"):
        parse_devices("8", profile)
    assert (parse_devices("a100:2x8", profile).nodes, parse_devices("a100:8", profile).per_node) == (2, 8)


@pytest.mark.parametrize(
    ("prompts", "outputs", "gaps", "why"),
    [
        ([5, 0], [1, 1], [0, 1], "prompt length 0 of request 1 is no whole number from 1 on"),
        ([5, 5], [1, 0], [0, 1], "output length 0 of request 1"),
        ([5, 2.5], [1, 1], [0, 1], "prompt length 2.5"),
        ([5, 5, 5], [1, 1, 1], [0, 1, -0.5], "gap -0.5 of request 2 is negative"),
        ([5, 5], [1, 1], [0, float("inf")], "gap inf of request 1 is not finite"),
        ([5, 5], [1, 1], [0, 0], "all gaps are 0"),
        ([], [], [], "no requests"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(prompts: Any, outputs: Any, gaps: Any, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        workload(prompts, outputs, gaps)


def test_replayed_gaps_keep_their_proportions(tmp_path: Path) -> None:
    times = [100.0, 300.0, 310.0, 700.0]
    lines = [json.dumps({"prompt_len": 9, "output_len": 4, "arrival_ms": time}) for time in times]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    load = read_trace(tmp_path / "log.jsonl", "replay", None, seed=0)
    # three gaps in 600 ms are 5 requests per second
    np.testing.assert_allclose(load.arrivals_ms(5.0), np.array(times) - 100)
    (tmp_path / "gaps.csv").write_text("prompt_len,output_len,gap_ms\n9,4,0\n9,4,200\n9,4,10\n9,4,390\n")
    replayed = read_trace(tmp_path / "gaps.csv", "replay", None, seed=0)
    np.testing.assert_allclose(replayed.unit_gaps, load.unit_gaps)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("prompt_len,output_len,arrival_ms\n9,4,100\n9,4,50\n9,4,900\n", "gap .* of request 1 is negative"),
        ("prompt_len,output_len\n9,4\n", "replay needs a column arrival_ms or gap_ms"),
        ("prompt_len,gap_ms\n9,4\n", "output_len of request 0 is None, not a number"),
        ("prompt_len,output_len,gap_ms\n9,many,3\n", "output_len of request 0 is 'many', not a number"),
        ("", "no rows"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(InvalidRequestError, match=why):
        read_trace(tmp_path / "trace.csv", "replay", None, seed=0)


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="No such file"):
        read_trace(tmp_path / "none.csv", "poisson", None, seed=0)
    with pytest.raises(InvalidRequestError, match="No such file"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(InvalidRequestError, match="1001 requests wanted, the workload has 1000"):
        read_trace(TRACE, "poisson", 1001, seed=0)


@pytest.mark.parametrize(("arrivals", "cv2"), [("poisson", 1.0), ("gamma", 2.0)])
def test_drawn_workloads_have_their_moments(arrivals: str, cv2: float) -> None:
    load = draw("sharegpt", arrivals, 20_000, seed=7)
    gaps = load.unit_gaps[1:]
    assert gaps.mean() == pytest.approx(1.0, rel=0.05)
    assert gaps.var() == pytest.approx(cv2, rel=0.1)
    assert (load.prompts + load.outputs).max() < 2048
    again = draw("sharegpt", arrivals, 20_000, seed=7)
    assert again.prompts.tolist() == load.prompts.tolist()
    fixed = draw("fixed:12,3", arrivals, 5, seed=0)
    assert fixed.prompts.tolist() == [12] * 5
    for name in ("fixed:12", "alpaca"):
        with pytest.raises(InvalidRequestError, match="fixed:PROMPT,OUTPUT"):
            draw(name, arrivals, 5, seed=0)
    with pytest.raises(InvalidRequestError, match="cannot be drawn"):
        draw("sharegpt", "replay", 5, seed=0)


def test_the_command_prints_a_table_or_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OPTIONS, "--devices", "a100:8"]) == 0
    text = capsys.readouterr().out
    assert (
        "Disaggregate: 1 × (prefill TP 4 PP 1 + decode TP 1 PP 2): 21 requests/s on 6 devices, 3.5 per device" in text
    )
    assert "instead of 1 × (both TP 4 PP 1)" in text
    assert "no step times for tensor 5" in text
    assert main([*OPTIONS, "--devices", "a100:8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["disaggregate"] is True
    assert found["best"]["parts"][0]["shape"] == [1, 4, 1, 1, 2]
    assert found["best"]["goodput_per_device"] == 3.5
    assert len(found["searched"]["pairs"]["candidates"]) == 42


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["--devices", "h100:8"], "no step times for device 'h100'"),
        (["--devices", "a100:0"], "no devices"),
        (["--devices", "a100:8", "--slo-ttft", "1"], "no placement meets TTFT 1 ms"),
        (["--devices", "a100:8", "--rate", "-3"], "--rate -3 is no rate above 0"),
        (["--devices", "a100:8", "--rate", "500"], "500 requests/s need"),
    ],
)
def test_bad_input_ends_with_a_sentence(changes: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OPTIONS, *changes]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("zipserve plan: ")
    assert why in printed.err


def test_the_client_starts_the_planner_as_a_process(capfd: pytest.CaptureFixture[str]) -> None:
    options = cli_parser.build().parse_args(["plan", "--help", "--devices", "a100:8"])
    assert options.command == "planner"
    assert options.arguments == ["--help", "--devices", "a100:8"]
    assert cli_main(["plan", *OPTIONS, "--devices", "h100:8"]) == 2
    assert "no step times for device 'h100'" in capfd.readouterr().err
