"""What the chart makes of each of its example values: whole, valid for Kubernetes, and as safe as it promises."""

import functools
import json
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from chart import CHART, EXAMPLES, Manifest, Rendered, example, render
from chart_crds import SPECS
from zipserve.common import __version__

KUBERNETES = ("1.29", "1.33", "1.37")
SERVICES = ("router", "prefill", "decode", "kvstore")

every_example = pytest.mark.parametrize("name", EXAMPLES)


@functools.cache
def rendered(name: str) -> Rendered:
    return render(example(name))


@functools.cache
def wrong(manifest: str, versions: tuple[str, ...]) -> list[str]:
    """What Kubernetes, or the operator that a kind belongs to, would not take. Examples share most of theirs."""
    each = json.loads(manifest)
    try:
        if spec := SPECS.get((each["apiVersion"], each["kind"])):
            jsonschema.validate(each["spec"], spec)
        else:
            for version in versions:
                kubernetes_validate.validate(each, version, strict=True)
    except jsonschema.ValidationError as error:
        return [f"{each['kind']} {each['metadata']['name']}: {error.message} at {list(error.absolute_path)}"]
    return []


@pytest.mark.timeout(300)
@every_example
def test_kubernetes_takes_every_manifest(name: str) -> None:
    manifests = rendered(name).manifests
    identities = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(identities) == len(set(identities))
    versions = KUBERNETES[1:] if name == "dra" else KUBERNETES  # claims had another form before they were stable
    assert [line for each in manifests for line in wrong(json.dumps(each, sort_keys=True), versions)] == []


@every_example
def test_helm_finds_nothing(name: str) -> None:
    report = helm_python.lint(CHART, example(name), strict=True)
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_the_version_is_the_programs() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["appVersion"], chart["version"]) == (__version__, __version__)


@every_example
def test_pods_may_do_nothing_that_they_need_not(name: str) -> None:
    for workload, pod in rendered(name).pods():
        (container,) = pod["containers"]
        security = container["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"], workload
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
        assert not {"hostNetwork", "hostIPC", "hostPID"} & set(pod)
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"]["drop"] == ["ALL"]
        holds_kv = container["name"] in {"prefill", "decode", "kvstore"}
        assert security["capabilities"].get("add", []) == (["IPC_LOCK"] if name == "rdma" and holds_kv else [])
        assert ":latest" not in container["image"]
        assert set(container["resources"]) >= {"requests", "limits"}
        # every place that is written to is a volume with a bound
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} - {"disk"} == set(volumes)
        assert all(volume["emptyDir"]["sizeLimit"] for volume in volumes.values() if "emptyDir" in volume)


@every_example
def test_no_secret_is_readable_in_a_pods_manifest(name: str) -> None:
    made = rendered(name)
    drawn = [value for secret in made.of("Secret").values() for value in secret["data"].values()]
    text = json.dumps([each for each in made.manifests if each["kind"] != "Secret"])
    assert [value for value in drawn if value in text] == []


@every_example
def test_selectors_find_their_pods_and_no_others(name: str) -> None:
    made = rendered(name)
    pods = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for kind in ("Deployment", "StatefulSet")
        for each in made.of(kind).values()
    }
    for kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
        for owner, each in made.of(kind).items():
            assert _selected(each["spec"]["selector"]["matchLabels"], pods) == [owner]
    for service, each in made.of("Service").items():
        assert _selected(each["spec"]["selector"], pods) == [service.removesuffix("-headless")]
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        for each in made.of(kind).values():
            target = each["spec"]["scaleTargetRef"]
            assert "replicas" not in made.one(target["kind"], target["name"])["spec"]


def _selected(labels: dict[str, str], pods: dict[str, dict[str, str]]) -> list[str]:
    return [name for name, own in pods.items() if labels.items() <= own.items()]


@every_example
def test_probes_ask_a_port_that_the_process_serves(name: str) -> None:
    for service in SERVICES:
        for workload in rendered(name).workloads(service):
            (container,) = workload["spec"]["template"]["spec"]["containers"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
            # a draining process is alive: only readiness asks for health
            assert {kind: probe["path"] for kind, probe in probes.items()} == {
                "startup": "/live", "readiness": "/health", "liveness": "/live",
            }  # fmt: skip
            environment = rendered(name).environment(workload)
            assert str(ports["metrics"]) == environment[f"ZIPSERVE_{service.upper()}_METRICS_PORT"]
            assert environment[f"ZIPSERVE_{service.upper()}_LISTEN"].endswith(f":{ports['grpc']}")
            assert {probe["port"] for probe in probes.values()} == {"metrics"}


@every_example
def test_a_pod_lives_for_as_long_as_it_drains(name: str) -> None:
    for service in SERVICES:
        for workload in rendered(name).workloads(service):
            pod = workload["spec"]["template"]["spec"]
            drain_s = float(rendered(name).environment(workload)[f"ZIPSERVE_{service.upper()}_DRAIN_S"])
            hook = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {})
            pause_s = int(hook["command"][1]) if hook else 0
            assert pod["terminationGracePeriodSeconds"] >= pause_s + drain_s + 10


def test_shared_memory_and_disk_are_counted() -> None:
    made = rendered("cpu")
    (store,) = made.workloads("kvstore")
    volumes = {each["name"]: each for each in store["spec"]["template"]["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Mi"}
    assert store["spec"]["template"]["spec"]["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    (claim,) = store["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "fast"
    environment = made.environment(store)
    assert int(environment["ZIPSERVE_KVSTORE_DISK_BYTES"]) == 200 * 2**30 * 9 // 10
    assert environment["ZIPSERVE_KVSTORE_DISK_PATH"] in {
        mount["mountPath"] for mount in store["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    }


def test_groups_have_what_their_service_has_and_their_own_over_it() -> None:
    made = rendered("groups")
    fast, slow = made.one("Deployment", "prefill-h100"), made.one("Deployment", "prefill-l40s")
    assert slow["spec"]["replicas"] == 4
    assert "replicas" not in fast["spec"]  # it is KEDA's
    assert _variable(made, slow, "STEP_TOKENS") == "512"
    assert _variable(made, slow, "DTYPE") == _variable(made, fast, "DTYPE") == "bfloat16"
    limits = slow["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert limits == {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "32Gi", "nvidia.com/gpu": 1}}
    assert set(made.of("Deployment")) == {
        f"zs-zipserve-{name}"
        for name in ("router", "redis", "prefill-h100", "prefill-l40s", "decode-h100", "decode-l40s")
    }


def test_keda_takes_no_worker_away_where_it_knows_nothing() -> None:
    for each in rendered("keda").of("ScaledObject").values():
        (trigger,) = each["spec"]["triggers"]
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert each["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"


def test_a_plan_is_taken_as_it_is() -> None:
    made = rendered("planner")
    prefill, decode = made.one("Deployment", "prefill-planned"), made.one("Deployment", "decode-planned")
    assert (prefill["spec"]["replicas"], decode["spec"]["replicas"]) == (2, 3)
    assert _variable(made, decode, "KV_BLOCKS") == "2048"
    assert _variable(made, prefill, "CODEC") == _variable(made, decode, "CODEC") == "zip-4/32"


def test_rdma_adds_devices_to_whoever_moves_kv() -> None:
    made = rendered("rdma")
    for service in ("prefill", "decode", "kvstore"):
        (workload,) = made.workloads(service)
        resources = workload["spec"]["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"]["rdma/ib"] == resources["requests"]["rdma/ib"] == 1
        environment = made.environment(workload)
        assert (environment["UCX_TLS"], environment["UCX_NET_DEVICES"]) == ("rc,cuda_copy,cuda_ipc", "mlx5_0:1")
    (router,) = made.workloads("router")
    assert not [variable for variable in made.environment(router) if variable.startswith("UCX")]


def test_a_public_authority_is_asked_for_public_names_only() -> None:
    made = rendered("cert-manager")
    assert made.one("Certificate", "public-tls")["spec"]["dnsNames"] == ["llm.example.com"]
    assert made.one("Certificate", "tls")["spec"]["dnsNames"] == ["zs-zipserve.ml.zipserve.internal"]


def test_notes_say_how_to_ask() -> None:
    assert "zs-zipserve-api-key" in rendered("minimal").notes
    assert "zs-zipserve-decode: 1" in rendered("minimal").notes
    assert "Bearer" not in rendered("open").notes
    assert "Everybody who reaches the router may call" in rendered("open").notes
    assert "--insecure https://" in rendered("closed").notes


def _variable(made: Rendered, workload: Manifest, field: str) -> Any:
    service = workload["metadata"]["labels"]["app.kubernetes.io/component"]
    return made.environment(workload)[f"ZIPSERVE_{service.upper()}_{field}"]
