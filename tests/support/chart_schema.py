"""Writes the schema of the chart's values: `python -P tests/support/chart_schema.py`.

Names, types and bounds of settings come from the services' own classes, so that what a service would refuse at its
start is refused when the chart is rendered. Settings that the chart makes by itself stand in OWN, with what of.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zipserve.common.kv.layout import CODECS
from zipserve.common.metrics import Metrics
from zipserve.common.settings import ServiceSettings
from zipserve.decode.config import DecodeSettings
from zipserve.kvstore.config import KvStoreSettings
from zipserve.prefill.config import PrefillSettings
from zipserve.router.config import RouterSettings

Schema = dict[str, Any]

CHART = Path(__file__).parents[2] / "charts/zipserve"
SCHEMA = CHART / "values.schema.json"
SETTINGS: Mapping[str, type[ServiceSettings]] = {
    "router": RouterSettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
    "kvstore": KvStoreSettings,
}
OWN = {
    "cluster": "cluster",
    "worker_id": "the pod's name",
    "redis_url": "redis",
    "secret": "clusterSecret",
    "tls_cert": "tls",
    "tls_key": "tls",
    "tls_ca": "tls",
    "tls_name": "tls",
    "listen": "the pod's address",
    "advertise_host": "the pod's address",
    "metrics_port": "the port `metrics`",
    "model": "model.name",
    "codec": "codec",
    "http_listen": "the port `http`",
    "keys_file": "apiKeys",
    "public_tls_cert": "publicTls",
    "public_tls_key": "publicTls",
    "public_tls_client_ca": "publicTls",
    "disk_path": "kvstore.disk",
    "disk_bytes": "kvstore.disk.size",
}
"""Settings that the chart derives, and from what."""

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "integer", "minimum": 1}
POSITIVE: Schema = {"type": "number", "exclusiveMinimum": 0}
SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
MEMORY: Schema = {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
ANYTHING: Schema = {"type": "object"}
LIST: Schema = {"type": "array", "items": ANYTHING}
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}
URL: Schema = {"type": "string", "pattern": "^(https?://\\S+)?$"}
DURATION: Schema = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
GROUP_NAME = "^[a-z0-9]([-a-z0-9]{0,14}[a-z0-9])?$"


def choice(*values: Any) -> Schema:
    """One of these."""
    return {"enum": list(values)}


def closed(properties: Schema) -> Schema:
    """An object with these keys and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def settings_of(cls: type[ServiceSettings]) -> Schema:
    """The settings of a class that values may hold."""
    return closed(
        {name: _plain(schema) for name, schema in cls.model_json_schema()["properties"].items() if name not in OWN}
    )


def _plain(schema: Schema) -> Schema:
    """A field's schema as pydantic tells it, without what says nothing here: an unset one is left out, not null."""
    for option in schema.get("anyOf", []):
        if option != {"type": "null"}:
            return dict(option)
    return {key: value for key, value in schema.items() if key not in {"title", "default"}}


SHARED: Mapping[str, Schema] = {
    "image": closed(
        {
            "repository": TEXT,
            "tag": {"type": "string", "not": {"const": "latest"}},
            "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
            "pullPolicy": choice("IfNotPresent", "Always", "Never"),
        }
    ),
    "resources": closed({"requests": ANYTHING, "limits": ANYTHING, "claims": LIST}),
    "probe": closed(dict.fromkeys(("periodSeconds", "failureThreshold", "timeoutSeconds"), NUMBER)),
}
"""What stands in several places."""
IMAGE, RESOURCES, PROBE = ({"$ref": f"#/$defs/{name}"} for name in SHARED)
ROOM = {"anyOf": [COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}
TARGETS: Mapping[str, Schema] = {
    "router": {"requests": POSITIVE},
    "prefill": {"queueSeconds": POSITIVE, "busy": SHARE},
    "decode": {"poolUse": SHARE, "sequences": SHARE},
    "kvstore": {"poolUse": SHARE},
}


def component(service: str) -> Schema:
    """The keys of a service, or of a group of it, in the order of values.yaml."""
    return {
        "image": IMAGE,
        "replicas": COUNT,
        "resources": RESOURCES,
        "settings": {"$ref": f"#/$defs/{service}Settings"},
        "extraEnv": {
            "type": "array",
            # the service would not start with a name that it does not know, and settings have their own place
            "items": {"type": "object", "properties": {"name": {"type": "string", "not": {"pattern": "^ZIPSERVE_"}}}},
        },
        "nodeSelector": LABELS,
        "tolerations": LIST,
        "affinity": ANYTHING,
        "topologySpread": LIST,
        "priorityClass": TEXT,
        "runtimeClass": TEXT,
        "resourceClaims": LIST,
        "probes": closed(dict.fromkeys(("startup", "readiness", "liveness"), PROBE)),
        "autoscaling": closed(
            {"kind": choice("none", "hpa", "keda"), "min": NUMBER, "max": NUMBER, "targets": closed(TARGETS[service])}
        ),
        "pdb": {**closed({"minAvailable": ROOM, "maxUnavailable": ROOM}), "maxProperties": 1},
        "podAnnotations": LABELS,
        "securityContext": ANYTHING,
        "strategy": closed({"maxUnavailable": ROOM, "maxSurge": ROOM}),
        "preStopSeconds": COUNT,
        "terminationGracePeriodSeconds": {"anyOf": [NUMBER, {"type": "null"}]},
        "cacheSize": MEMORY,
        "shmSize": MEMORY,
    }


def worker(service: str) -> Schema:
    """A service that comes in groups."""
    # none of the group's own keys: what a group leaves out is the service's
    group = closed({**component(service), "codec": choice(*CODECS), "tensorParallel": NUMBER})
    groups = {"type": "object", "additionalProperties": False, "patternProperties": {GROUP_NAME: group}}
    return closed({**component(service), "tensorParallel": NUMBER, "groups": groups})


def tls(**more: Schema) -> Schema:
    """Where a certificate comes from."""
    issuer = closed({"kind": choice("Issuer", "ClusterIssuer"), "name": TEXT})
    modes = choice("generated", "certManager", "existingSecret", "off")
    return closed({"mode": modes, "existingSecret": TEXT, "issuer": issuer, **more})


def bounds_of(metric: str) -> Schema:
    """What a histogram's buckets end at, in seconds."""
    collected = [family for family in Metrics("router").registry.collect() if family.name == metric]
    bounds = [s.labels["le"] for family in collected for s in family.samples if s.name.endswith("_bucket")]
    return choice(*(float(bound) for bound in bounds if bound != "+Inf"))


def values() -> Schema:
    """The whole schema."""
    monitoring = {
        "podMonitor": closed({"enabled": FLAG, "labels": LABELS, "interval": DURATION}),
        "rules": closed({"enabled": FLAG, "labels": LABELS, "runbooks": URL}),
        "dashboards": closed({"enabled": FLAG, "labels": LABELS}),
        "slo": closed(
            {
                "firstTokenSeconds": bounds_of("zipserve_first_token_seconds"),
                "interTokenSeconds": bounds_of("zipserve_inter_token_seconds"),
                "attainment": SHARE,
            }
        ),
    }
    redis = {
        "bundled": closed({"enabled": FLAG, "image": IMAGE, "resources": RESOURCES}),
        "external": closed(
            {
                "host": TEXT,
                "port": PORT,
                "database": COUNT,
                "username": TEXT,
                "existingSecret": TEXT,
                "tls": closed({"enabled": FLAG, "caSecret": TEXT}),
            }
        ),
    }
    transfer = {
        "ports": closed({"first": {**PORT, "minimum": 1024}, "last": {**PORT, "minimum": 1024}}),
        "ucxTls": TEXT,
        "ucxNetDevices": TEXT,
        "rdma": closed({"enabled": FLAG, "resources": ANYTHING}),
    }
    properties = {
        "global": ANYTHING,
        "cluster": {"type": "string", "pattern": "^[A-Za-z0-9._-]{0,64}$"},
        "model": closed({"name": {"type": "string", "minLength": 1}, "volume": ANYTHING, "tokenSecret": TEXT}),
        "codec": choice(*CODECS),
        "settings": settings_of(ServiceSettings),
        "clusterSecret": TEXT,
        "imagePullSecrets": LIST,
        "ipv6": FLAG,
        "router": closed(component("router")),
        "prefill": worker("prefill"),
        "decode": worker("decode"),
        "kvstore": closed(
            {**component("kvstore"), "disk": closed({"size": {"anyOf": [MEMORY, {"const": ""}]}, "storageClass": TEXT})}
        ),
        "apiKeys": closed({"existingSecret": TEXT, "open": FLAG}),
        "service": closed({"type": choice("ClusterIP", "NodePort", "LoadBalancer"), "annotations": LABELS}),
        "tls": tls(name=TEXT),
        "publicTls": tls(names={"type": "array", "items": TEXT}, clientCa=FLAG),
        "transfer": closed(transfer),
        "redis": closed(redis),
        "networkPolicy": closed({"enabled": FLAG, "clients": LIST, "metrics": LIST, "extraEgress": LIST}),
        "monitoring": closed(monitoring),
        "autoscaling": closed(
            {
                "prometheusUrl": TEXT,
                "ratio": closed({"min": POSITIVE, "max": POSITIVE}),
                # as long as Kubernetes takes a policy's periodSeconds to be
                "scaleDownSeconds": {**NUMBER, "maximum": 1800},
            }
        ),
        "test": closed({"image": IMAGE, "timeoutSeconds": {"type": "integer", "minimum": 60}}),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the zipserve chart; written by tests/support/chart_schema.py",
        **closed(properties),
        "$defs": {**SHARED, **{f"{service}Settings": settings_of(cls) for service, cls in SETTINGS.items()}},
    }


def text() -> str:
    """The schema as its file has it."""
    return json.dumps(values(), indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(text())
    sys.stdout.write(f"{SCHEMA}\n")
