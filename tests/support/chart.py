"""Renders the chart with Helm's own engine, offline, and finds what is in it.

`python -P tests/support/chart.py FOLDER` writes what the examples make, for tools that read files.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parents[2] / "charts/zipserve"
EXAMPLES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
RELEASE, NAMESPACE = "zs", "ml"

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """What an installation consists of."""

    manifests: list[Manifest]
    notes: str

    def of(self, kind: str) -> dict[str, Manifest]:
        """All of a kind, by name."""
        return {each["metadata"]["name"]: each for each in self.manifests if each["kind"] == kind}

    def one(self, kind: str, name: str) -> Manifest:
        """The one of this name, which may leave out the release's."""
        found = self.of(kind)
        return found.get(name) or found[f"{RELEASE}-zipserve-{name}"]

    def pods(self) -> Iterator[tuple[str, Manifest]]:
        """Specs of all pods, with the name of what makes them."""
        for manifest in self.manifests:
            name = manifest["metadata"]["name"]
            if manifest["kind"] == "Pod":
                yield name, manifest["spec"]
            elif manifest["kind"] in {"Deployment", "StatefulSet"}:
                yield name, manifest["spec"]["template"]["spec"]

    def workloads(self, service: str) -> list[Manifest]:
        """Those that run a service, one for each group."""
        return [
            each
            for each in self.manifests
            if each["kind"] in {"Deployment", "StatefulSet"}
            and each["metadata"]["labels"]["app.kubernetes.io/component"] == service
        ]

    def environment(self, workload: Manifest) -> dict[str, str]:
        """Variables of its container as the kubelet would make them; secrets have their references as values."""
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        fields = {"metadata.name": f"{workload['metadata']['name']}-0", "status.podIP": "10.1.2.3"}
        made: dict[str, str] = {}
        for variable in container["env"]:
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                made[variable["name"]] = fields[source["fieldRef"]["fieldPath"]]
            elif "secretKeyRef" in source:
                reference = source["secretKeyRef"]
                made[variable["name"]] = f"secret-{reference['name']}-{reference['key']}"
            else:
                value = variable["value"]
                for name, known in made.items():  # only what stands before it is known to it
                    value = value.replace(f"$({name})", known)
                made[variable["name"]] = value
        return made


def example(name: str) -> dict[str, Any]:
    """Values of one of the files in ci/."""
    values: dict[str, Any] = yaml.safe_load(EXAMPLES[name].read_text())
    return values


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Values over values, as with several -f."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def render(values: Mapping[str, Any] | None = None) -> Rendered:
    """The chart with these values over its own.

    Raises:
        helm_python.HelmValuesError: the schema refuses them.
        helm_python.HelmRenderError: a template does.
    """
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(dict(values or {}), name=RELEASE, namespace=NAMESPACE)
    notes = files.pop("zipserve/templates/NOTES.txt")
    manifests = [each for text in files.values() for each in yaml.safe_load_all(text) if each]
    return Rendered(manifests, notes)


if __name__ == "__main__":
    for name in EXAMPLES:
        text = yaml.safe_dump_all(render(example(name)).manifests)
        (Path(sys.argv[1]) / f"{name}.yaml").write_text(text)
