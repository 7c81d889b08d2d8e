"""Who may reach whom, as the rendered policies have it."""

from collections.abc import Mapping
from typing import Any

import pytest

from chart import NAMESPACE, Rendered, example, render

Labels = Mapping[str, str]
OUTSIDE: Labels = {"app": "somebody"}


def pod(service: str, release: str = "zs") -> Labels:
    return {
        "app.kubernetes.io/name": "zipserve",
        "app.kubernetes.io/instance": release,
        "app.kubernetes.io/component": service,
    }


class Network:
    """Ingress as Kubernetes reads the policies: whom a policy selects, only those reach that a rule allows."""

    def __init__(self, made: Rendered) -> None:
        self._policies = [each["spec"] for each in made.of("NetworkPolicy").values()]

    def reaches(self, source: Labels, target: Labels, port: int, namespace: str = NAMESPACE) -> bool:
        policies = [p for p in self._policies if "Ingress" in p["policyTypes"] and _matches(p["podSelector"], target)]
        if not policies:
            return True
        rules = [rule for policy in policies for rule in policy["ingress"]]
        return any(_opens(rule, port) and _admits(rule, source, namespace) for rule in rules)


def _opens(rule: dict[str, Any], port: int) -> bool:
    return any(each["port"] <= port <= each.get("endPort", each["port"]) for each in rule["ports"])


def _admits(rule: dict[str, Any], source: Labels, namespace: str) -> bool:
    return "from" not in rule or any(_is_peer(peer, source, namespace) for peer in rule["from"])


def _is_peer(peer: dict[str, Any], source: Labels, namespace: str) -> bool:
    if "namespaceSelector" not in peer:
        return namespace == NAMESPACE and _matches(peer["podSelector"], source)
    labels = {"kubernetes.io/metadata.name": namespace}
    return _matches(peer["namespaceSelector"], labels) and _matches(peer.get("podSelector", {}), source)


def _matches(selector: dict[str, Any], labels: Labels) -> bool:
    assert all(each["operator"] == "In" for each in selector.get("matchExpressions", []))
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(render())


def test_everybody_reaches_the_router_and_nothing_else(network: Network) -> None:
    assert network.reaches(OUTSIDE, pod("router"), 7000, "apps")
    assert network.reaches(OUTSIDE, pod("router"), 8000, "apps")
    for service in ("prefill", "decode", "kvstore", "redis"):
        for port in (6379, 7000, 8000, 20500):
            assert not network.reaches(OUTSIDE, pod(service), port)
            assert not network.reaches(pod("router", "another"), pod(service), port)


@pytest.mark.parametrize("target", ["prefill", "decode", "kvstore"])
def test_services_reach_each_other_as_they_have_to(network: Network, target: str) -> None:
    assert network.reaches(pod("router"), pod(target), 7000)
    assert not network.reaches(pod("router"), pod(target), 20500)  # it moves no KV
    for source in ("prefill", "decode", "kvstore"):
        assert network.reaches(pod(source), pod(target), 7000)
        assert network.reaches(pod(source), pod(target), 20000)
        assert network.reaches(pod(source), pod(target), 20999)
        assert not network.reaches(pod(source), pod(target), 21000)


def test_only_the_services_reach_redis(network: Network) -> None:
    for service in ("router", "prefill", "decode", "kvstore"):
        assert network.reaches(pod(service), pod("redis"), 6379)
    assert not network.reaches(pod("test"), pod("redis"), 6379)


def test_clients_and_prometheus_may_be_named() -> None:
    network = Network(render(example("closed")))
    assert network.reaches(OUTSIDE, pod("router"), 7000, "apps")
    assert not network.reaches(OUTSIDE, pod("router"), 7000, "others")
    assert network.reaches(pod("test"), pod("router"), 7000)
    for service in ("router", "prefill"):
        assert network.reaches(OUTSIDE, pod(service), 9400, "monitoring")
        assert not network.reaches(OUTSIDE, pod(service), 9400, "apps")


def egress_ports(values: Mapping[str, Any]) -> list[int]:
    egress = render(values).one("NetworkPolicy", "egress")["spec"]["egress"]
    return [port["port"] for rule in egress for port in rule.get("ports", [])]


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://collector:4317", 4317),
        ("http://collector/v1", 80),
        ("https://collector", 443),
        ("http://10.0.0.1", 80),
        ("http://[fd00::1]", 80),
        ("http://[fd00::1]:4317", 4317),
    ],
)
def test_pods_reach_every_collector(url: str, port: int) -> None:
    local = {"model": {"name": "/models/a", "volume": {"emptyDir": {}}}}
    assert egress_ports({**local, "settings": {"otlp_endpoint": url}}) == [53, 53, port]
    own = {"router": {"settings": {"otlp_endpoint": url}}, "decode": {"settings": {"otlp_endpoint": "http://b:1"}}}
    assert egress_ports({**local, **own}) == [53, 53, port, 1]


def test_pods_reach_out_for_what_they_need_only() -> None:
    def ports(name: str) -> list[int]:
        return egress_ports(example(name))

    assert ports("minimal") == [53, 53, 443]  # DNS, and the model
    assert ports("cpu") == [53, 53, 4317]  # the collector; the model is on a volume
    assert ports("external-redis") == [53, 53, 6380, 443]
    assert ports("closed") == [53, 53, 443, 8443]
    assert not render(example("no-network-policy")).of("NetworkPolicy")
