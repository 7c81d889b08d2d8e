"""Values that would not work are refused when the chart is rendered, by a message that names value and limit."""

from typing import Any

import helm_python
import pytest
import yaml

from chart import example, merged, render

REFUSED = [
    # what no value may be
    ("{router: {settings: {requests_max: 0}}}", ["/router/settings/requests_max", "got 0, want 1"]),
    ("{router: {settings: {request_max: 9}}}", ["'request_max' not allowed"]),
    ("{router: {settings: {listen: '0.0.0.0:1'}}}", ["'listen' not allowed"]),
    ("{kvstore: {settings: {kv_blocks: 9}}}", ["'kv_blocks' not allowed"]),
    ("{prefill: {settings: {block_tokens: 100}}}", ["/prefill/settings/block_tokens", "100"]),
    ("{decode: {settings: {dtype: fp8}}}", ["/decode/settings/dtype", "bfloat16"]),
    ("{codec: zip-9/9}", ["/codec", "zip-4/32"]),
    ("{prefil: {replicas: 2}}", ["'prefil' not allowed"]),
    ("{prefill: {groups: {H100: {}}}}", ["'H100' not allowed"]),
    ("{prefill: {groups: {a: {groups: {}}}}}", ["'groups' not allowed"]),
    ("{router: {image: {tag: latest}}}", ["/router/image/tag"]),
    ("{router: {extraEnv: [{name: ZIPSERVE_ROUTER_MODEL, value: x}]}}", ["/router/extraEnv/0/name"]),
    ("{decode: {autoscaling: {kind: both}}}", ["/decode/autoscaling/kind", "'hpa', 'keda'"]),
    ("{decode: {pdb: {minAvailable: 1}}}", ["/decode/pdb", "got 2, want 1"]),
    ("{monitoring: {slo: {firstTokenSeconds: 0.3}}}", ["/monitoring/slo/firstTokenSeconds", "0.25"]),
    ("{transfer: {ports: {first: 80}}}", ["/transfer/ports/first", "got 80, want 1,024"]),
    ("{monitoring: {rules: {runbooks: docs/runbooks}}}", ["/monitoring/rules/runbooks"]),
    ("{autoscaling: {scaleDownSeconds: 1801}}", ["/autoscaling/scaleDownSeconds", "got 1,801, want 1,800"]),
    ("{kvstore: {disk: {size: 10 gigs}}}", ["/kvstore/disk/size"]),
    # what does not go together
    (
        "{decode: {terminationGracePeriodSeconds: 90}}",
        ["decode.terminationGracePeriodSeconds is 90, must be at least 130: preStopSeconds 0 + drain_s 120 + 10"],
    ),
    (
        "{prefill: {groups: {a: {settings: {lease_ttl_s: 60}}}}}",
        ["prefill.groups.a.settings: lease_ttl_s is 60, must be below drain_s 60"],
    ),
    ("{kvstore: {settings: {drain_s: 0}}}", ["kvstore.settings: lease_ttl_s is 10, must be below drain_s 0"]),
    ("{settings: {heartbeat_s: 2}}", ["router.settings: registry_ttl_s is 5, must be at least 3 x heartbeat_s 2"]),
    (
        "{decode: {autoscaling: {kind: hpa, min: 9}}, monitoring: {rules: {enabled: true}}}",
        ["decode.autoscaling: min is 9, must be at most max 8"],
    ),
    ("{decode: {autoscaling: {kind: keda}}}", ["decode.autoscaling.kind is keda", "set monitoring.rules.enabled"]),
    ("{decode: {shmSize: 6Gi}}", ["decode.shmSize is 6Gi, must be below resources.limits.memory 6Gi"]),
    ("{prefill: {groups: {a: {tensorParallel: 2}}}}", ["prefill.groups.a.tensorParallel is 2, must be 1"]),
    (
        "{decode: {resources: {limits: {nvidia.com/gpu: 4}}}}",
        ["decode.resources.limits has 4 of nvidia.com/gpu, must be tensorParallel 1"],
    ),
    (
        "{prefill: {settings: {block_tokens: 96}}}",
        ["prefill.settings: block_tokens is 96, must be a multiple of 64 with codec zip-4/32"],
    ),
    (
        "{decode: {groups: {a: {}, b: {codec: raw}}}}",
        ["one layout only", "decode.groups.b has codec raw", "prefill, decode.groups.a has codec zip-4/32"],
    ),
    ("{router: {replicas: 0}}", ["router.replicas is 0"]),
    ("{decode: {replicas: 0}}", ["decode has no replicas"]),
    ("{prefill: {replicas: 0}}", ["router.settings.local_prefill_tokens_max is 0: must be -1"]),
    ("{redis: {external: {host: r, existingSecret: s}}}", ["redis.external.host is r", "choose one"]),
    ("{redis: {bundled: {enabled: false}}}", ["redis.external.host is empty"]),
    ("{redis: {bundled: {enabled: false}, external: {host: r}}}", ["existingSecret is empty: r must ask"]),
    ("{tls: {mode: existingSecret}}", ["tls.mode is existingSecret, and tls.existingSecret is empty"]),
    ("{tls: {mode: existingSecret, existingSecret: t}}", ["tls.name is empty", "certificates of t"]),
    ("{tls: {existingSecret: t, name: n}}", ["tls.existingSecret is t, and tls.mode is generated"]),
    ("{publicTls: {mode: certManager}}", ["publicTls.mode is certManager, and publicTls.issuer.name is empty"]),
    ("{publicTls: {mode: generated, clientCa: true}}", ["publicTls.clientCa is true", "router's own key"]),
    ("{publicTls: {mode: certManager, issuer: {name: i}}}", ["publicTls.names is empty: with mode certManager"]),
    (
        "{decode: {replicas: 9}, transfer: {ports: {first: 20000, last: 20009}}}",
        ["transfer.ports 20000-20009 are 10, must be at least 24: 2 for each of 11 workers and stores"],
    ),
    ("{transfer: {rdma: {enabled: true}}}", ["transfer.rdma.resources is empty"]),
    ("{autoscaling: {ratio: {min: 9}}}", ["autoscaling.ratio.min is 9, must be at most max 8"]),
    ("{model: {name: /models/a}}", ["model.name is the folder /models/a, and model.volume is empty"]),
]  # fmt: skip


@pytest.mark.parametrize(("values", "told"), REFUSED, ids=[values for values, _ in REFUSED])
def test_values_that_would_not_work_are_refused(values: str, told: list[str]) -> None:
    with pytest.raises((helm_python.HelmRenderError, helm_python.HelmValuesError)) as refusal:
        render(yaml.safe_load(values))
    assert [part for part in told if part not in str(refusal.value)] == []


@pytest.mark.parametrize("name", ["x" * 23, "zipserve-" + "x" * 23])
def test_a_release_with_a_long_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chart.RELEASE", name)
    assert render().of("Deployment")
    monkeypatch.setattr("chart.RELEASE", name + "x")
    with pytest.raises(helm_python.HelmRenderError, match="has 33 characters: names of pods leave room for 32"):
        render()


def test_a_cluster_with_a_long_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chart.NAMESPACE", "n" * 61)
    assert render().of("Deployment")
    monkeypatch.setattr("chart.NAMESPACE", "n" * 62)
    assert render({"cluster": "mine"}).of("Deployment")
    with pytest.raises(helm_python.HelmRenderError, match="has 65 characters, must be at most 64: set cluster"):
        render()


def test_what_is_refused_is_near_to_what_is_not() -> None:
    """The limits themselves are allowed."""
    near: list[dict[str, Any]] = [
        {"decode": {"terminationGracePeriodSeconds": 130, "shmSize": "5Gi"}},
        {"prefill": {"settings": {"lease_ttl_s": 59.5}}},
        {"settings": {"heartbeat_s": 1.5, "registry_ttl_s": 4.5}},
        {"decode": {"replicas": 9}, "transfer": {"ports": {"first": 20000, "last": 20023}}},
        {"prefill": {"settings": {"block_tokens": 64}}, "decode": {"settings": {"block_tokens": 64}}},
        {"codec": "raw", "prefill": {"settings": {"block_tokens": 96}}, "decode": {"settings": {"block_tokens": 96}}},
    ]
    for values in near:
        render(merged(example("minimal"), values))
