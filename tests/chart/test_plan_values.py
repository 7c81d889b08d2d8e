"""What `zipserve plan --values` writes is taken by Helm as it is, and says what was planned."""

import pytest
import yaml

from chart import render
from worker_profiles import profile_of
from zipserve.planner.placement.candidate import Candidate, Group, Settings
from zipserve.planner.placement.values import as_yaml, values


@pytest.mark.parametrize("prefills", [0, 2])
def test_a_plan_is_an_installation(prefills: int) -> None:
    decode = Group(profile_of(device="cpu-2", threads=2, codec="zip-4/2"), 3, Settings(step_tokens=128, free_ms=250.0))
    prefill = Group(profile_of(device="cpu-2", threads=2, codec="zip-4/2"), prefills, Settings(slots=8))
    candidate = Candidate(prefill if prefills else None, decode)
    made = render(yaml.safe_load(as_yaml(values(candidate), str(candidate))))
    found = {role: made.workloads(role) for role in ("prefill", "decode")}
    assert [each["spec"]["replicas"] for each in found["prefill"]] == [prefills] * (prefills > 0)
    (workload,) = found["decode"]
    assert workload["spec"]["replicas"] == 3
    told = made.environment(workload)
    assert (told["ZIPSERVE_DECODE_STEP_TOKENS"], told["ZIPSERVE_DECODE_CODEC"]) == ("128", "zip-4/2")
    assert told.get("ZIPSERVE_DECODE_STEP_FREE_S") == (None if prefills else "0.25")
    (router,) = made.workloads("router")
    assert made.environment(router)["ZIPSERVE_ROUTER_LOCAL_PREFILL_TOKENS_MAX"] == ("0" if prefills else "-1")
    if prefills:
        assert made.environment(found["prefill"][0])["ZIPSERVE_PREFILL_SEQUENCES_MAX"] == "8"
