"""What was drawn at the first installation is found again by every upgrade, in a cluster that is asked for it."""

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

RESOURCES = {
    "kind": "APIResourceList",
    "apiVersion": "v1",
    "groupVersion": "v1",
    "resources": [
        {"name": "secrets", "singularName": "secret", "namespaced": True, "kind": "Secret", "verbs": ["get"]}
    ],
}


class Cluster:
    """As much of a Kubernetes API as `lookup` asks for: the secrets of one namespace."""

    def __init__(self, kubeconfig: str, secrets: dict[str, Manifest]) -> None:
        self._config = helm_python.Config(kubeconfig_content=kubeconfig, namespace=NAMESPACE)
        self._secrets = secrets

    def install(self, **values: Any) -> dict[str, dict[str, str]]:
        """Renders as an installation or upgrade would, and keeps the secrets; returns their data by name."""
        with helm_python.Chart.load(CHART) as chart:
            files = self._config.render(chart, values, name=RELEASE, namespace=NAMESPACE)
        documents = list(yaml.safe_load_all(files["zipserve/templates/secrets.yaml"]))
        self._secrets.update({each["metadata"]["name"]: each for each in documents if each})
        return {name: secret["data"] for name, secret in self._secrets.items()}

    def forget(self, name: str) -> None:
        del self._secrets[name]


@contextmanager
def cluster() -> Iterator[Cluster]:
    secrets: dict[str, Manifest] = {}
    folder = f"/api/v1/namespaces/{NAMESPACE}/secrets/"

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            found = RESOURCES if path == "/api/v1" else secrets.get(path.removeprefix(folder))
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
        yield Cluster(json.dumps(kubeconfig), secrets)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_upgrade_keeps_what_was_drawn() -> None:
    with cluster() as kubernetes:
        first = kubernetes.install(publicTls={"mode": "generated"})
        names = {f"zs-zipserve-{name}" for name in ("cluster", "api-key", "redis", "tls", "public-tls")}
        assert set(first) == names
        assert kubernetes.install(publicTls={"mode": "generated"}) == first
        kubernetes.forget("zs-zipserve-cluster")
        third = kubernetes.install(publicTls={"mode": "generated"})
        assert {name for name in names if third[name] != first[name]} == {"zs-zipserve-cluster"}
