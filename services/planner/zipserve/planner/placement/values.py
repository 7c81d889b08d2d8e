"""A plan as a values file of the Helm chart. Pure."""

from typing import Any

import yaml

from zipserve.planner.placement.candidate import Candidate, Group

GROUP = "planned"
_NONE = {"groups": {}, "replicas": 0}


def values(candidate: Candidate) -> dict[str, Any]:
    """What `helm install -f` takes: a group of workers for each role, and where the router has prompts computed."""
    decode_settings = {"step_free_s": candidate.decode.settings.free_ms / 1000} if candidate.prefill is None else {}
    return {
        "prefill": _role("prefill", candidate.prefill, {}) if candidate.prefill else _NONE,
        "decode": _role("decode", candidate.decode, decode_settings),
        "router": {"settings": {"local_prefill_tokens_max": 0 if candidate.prefill else -1}},
    }


def as_yaml(found: dict[str, Any], comment: str) -> str:
    """The file, with what it is for above it."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + str(yaml.safe_dump(found, sort_keys=False))


def _role(role: str, group: Group, settings: dict[str, Any]) -> dict[str, Any]:
    measured, own = group.profile.roles[role], group.settings
    settings = {
        "step_tokens": own.step_tokens or measured.step_tokens,
        "sequences_max": own.slots or measured.slots,
        "kv_blocks": measured.blocks,
        "kv_tails": measured.tails,
        **settings,
    }
    planned = {
        "replicas": group.replicas,
        "tensorParallel": group.profile.tensor,
        "codec": group.profile.codec,
        "settings": settings,
    }
    return {"groups": {GROUP: planned}}
