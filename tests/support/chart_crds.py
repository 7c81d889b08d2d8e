"""What the chart's custom resources may hold, as JSON schemas: of each kind the fields that are used, no others.

Kubernetes' own schemas do not know these kinds, and their operators take a misspelt field without a word.
"""

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
TEXTS: Schema = {"type": "array", "items": TEXT, "minItems": 1}
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}


def exactly(required: Schema, optional: Schema | None = None) -> Schema:
    """An object with these fields."""
    properties = {**required, **(optional or {})}
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def several(items: Schema) -> Schema:
    """A list of at least one."""
    return {"type": "array", "items": items, "minItems": 1}


CERTIFICATE = exactly(
    {
        "secretName": TEXT,
        "dnsNames": TEXTS,
        "issuerRef": exactly({"name": TEXT, "kind": {"enum": ["Issuer", "ClusterIssuer"]}, "group": TEXT}),
    },
    {
        "usages": {"type": "array", "items": {"enum": ["server auth", "client auth"]}},
        "privateKey": exactly(
            {"algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]}, "size": NUMBER},
            {"rotationPolicy": {"enum": ["Never", "Always"]}},
        ),
    },
)
_REQUIREMENT = exactly(
    {"key": TEXT, "operator": {"enum": ["In", "NotIn", "Exists", "DoesNotExist"]}}, {"values": TEXTS}
)
POD_MONITOR = exactly(
    {
        "selector": exactly({}, {"matchLabels": LABELS, "matchExpressions": several(_REQUIREMENT)}),
        "podMetricsEndpoints": several(
            exactly(
                {"port": TEXT},
                {"interval": TEXT, "relabelings": several(exactly({"sourceLabels": TEXTS, "targetLabel": TEXT}))},
            )
        ),
    },
    {"jobLabel": TEXT},
)
_RECORD = exactly({"record": TEXT, "expr": TEXT}, {"labels": LABELS})
_ALERT = exactly({"alert": TEXT, "expr": TEXT, "labels": LABELS, "annotations": LABELS}, {"for": TEXT})
PROMETHEUS_RULE = exactly({"groups": several(exactly({"name": TEXT, "rules": several({"oneOf": [_RECORD, _ALERT]})}))})
_POLICY = exactly({"type": {"enum": ["Pods", "Percent"]}, "value": NUMBER, "periodSeconds": NUMBER})
_DIRECTION = exactly({"stabilizationWindowSeconds": NUMBER, "policies": several(_POLICY)})
SCALED_OBJECT = exactly(
    {
        "scaleTargetRef": exactly({"apiVersion": TEXT, "kind": TEXT, "name": TEXT}),
        "minReplicaCount": NUMBER,
        "maxReplicaCount": NUMBER,
        "triggers": several(
            exactly(
                {
                    "type": {"const": "prometheus"},
                    "metricType": {"enum": ["AverageValue", "Value"]},
                    "metadata": exactly(
                        {"serverAddress": TEXT, "query": TEXT, "threshold": TEXT, "ignoreNullValues": TEXT}
                    ),
                }
            )
        ),
    },
    {
        "fallback": exactly(
            {"failureThreshold": NUMBER, "replicas": NUMBER},
            {"behavior": {"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]}},
        ),
        "advanced": exactly(
            {
                "horizontalPodAutoscalerConfig": exactly(
                    {"behavior": exactly({"scaleUp": _DIRECTION, "scaleDown": _DIRECTION})}
                )
            }
        ),
    },
)
SPECS = {
    ("cert-manager.io/v1", "Certificate"): CERTIFICATE,
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PROMETHEUS_RULE,
    ("keda.sh/v1alpha1", "ScaledObject"): SCALED_OBJECT,
}
