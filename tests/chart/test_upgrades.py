"""What an upgrade finds in the cluster is kept: what was drawn at first, and what autoscalers made of it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import helm_python
import yaml

from chart import CHART, NAMESPACE, RELEASE, Manifest

KINDS = {"/api/v1": ["Secret"], "/apis/apps/v1": ["Deployment", "StatefulSet"]}
KEPT = ("Secret", "Deployment", "StatefulSet")


class Cluster:
    """As much of a Kubernetes API as `lookup` asks for: secrets and workloads of one namespace."""

    def __init__(self, kubeconfig: str, objects: dict[str, Manifest]) -> None:
        self._config = helm_python.Config(kubeconfig_content=kubeconfig, namespace=NAMESPACE)
        self._objects = objects

    def install(self, **values: Any) -> dict[str, Manifest]:
        """Renders as an installation or upgrade would, and keeps what it makes; returns that by its path."""
        with helm_python.Chart.load(CHART) as chart:
            files = self._config.render(chart, values, name=RELEASE, namespace=NAMESPACE)
        files.pop("zipserve/templates/NOTES.txt")
        documents = [each for text in files.values() for each in yaml.safe_load_all(text) if each]
        made = {_path(each["kind"], each["metadata"]["name"]): each for each in documents if each["kind"] in KEPT}
        self._objects.update(made)
        return made

    def scale(self, kind: str, name: str, replicas: int) -> None:
        """As an autoscaler does."""
        self._objects[_path(kind, name)]["spec"]["replicas"] = replicas

    def forget(self, kind: str, name: str) -> None:
        del self._objects[_path(kind, name)]


def _path(kind: str, name: str) -> str:
    (group,) = [path for path, kinds in KINDS.items() if kind in kinds]
    return f"{group}/namespaces/{NAMESPACE}/{kind.lower()}s/{name}"


def _resources(path: str) -> dict[str, Any]:
    """What the API says that there is."""
    resources = [
        {"name": f"{kind.lower()}s", "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": ["get"]}
        for kind in KINDS[path]
    ]
    version = path.removeprefix("/api/").removeprefix("/apis/")
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


@contextmanager
def cluster() -> Iterator[Cluster]:
    objects: dict[str, Manifest] = {}

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            found = _resources(path) if path in KINDS else objects.get(path)
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            self.send_response(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(found or missing).encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  its name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": address}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": NAMESPACE}}],
        "users": [{"name": "me", "user": {}}],
    }
    try:
        yield Cluster(json.dumps(kubeconfig), objects)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def drawn(made: dict[str, Manifest]) -> dict[str, dict[str, str]]:
    """Data of the secrets, by name."""
    return {each["metadata"]["name"]: each["data"] for each in made.values() if each["kind"] == "Secret"}


def test_an_upgrade_keeps_what_was_drawn() -> None:
    values = {"publicTls": {"mode": "generated"}}
    with cluster() as kubernetes:
        first = drawn(kubernetes.install(**values))
        names = {f"zs-zipserve-{name}" for name in ("cluster", "api-key", "redis", "tls", "public-tls")}
        assert set(first) == names
        assert drawn(kubernetes.install(**values)) == first
        kubernetes.forget("Secret", "zs-zipserve-cluster")
        third = drawn(kubernetes.install(**values))
        assert {name for name in names if third[name] != first[name]} == {"zs-zipserve-cluster"}


def replicas(made: dict[str, Manifest]) -> dict[str, int | None]:
    """Of all workloads, by service; None: left to the autoscaler."""
    workloads = [each for each in made.values() if each["kind"] != "Secret"]
    found = {each["metadata"]["name"].removeprefix("zs-zipserve-"): each["spec"].get("replicas") for each in workloads}
    return {name: number for name, number in found.items() if name != "redis"}


def test_an_autoscaler_begins_with_what_there_is() -> None:
    """Replicas that a manifest names no more would become 1."""
    scaling = {"autoscaling": {"kind": "hpa"}}
    values = {"monitoring": {"rules": {"enabled": True}}, "decode": scaling, "kvstore": scaling}
    with cluster() as kubernetes:
        assert replicas(kubernetes.install(**values)) == {"router": 2, "prefill": 1, "decode": None, "kvstore": None}
    with cluster() as kubernetes:
        fixed = kubernetes.install(decode={"replicas": 5}, kvstore={"replicas": 3})
        assert replicas(fixed) == {"router": 2, "prefill": 1, "decode": 5, "kvstore": 3}
        assert replicas(kubernetes.install(**values)) == replicas(fixed)
        kubernetes.scale("Deployment", "zs-zipserve-decode", 7)
        assert replicas(kubernetes.install(**values)) == {**replicas(fixed), "decode": 7}
        kubernetes.scale("Deployment", "zs-zipserve-decode", 0)  # by hand, for a pause
        assert replicas(kubernetes.install(**values)) == {**replicas(fixed), "decode": 0}
