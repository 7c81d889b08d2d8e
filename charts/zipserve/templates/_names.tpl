{{- define "zipserve.fullname" -}}
{{ contains "zipserve" .Release.Name | ternary .Release.Name (printf "%s-zipserve" .Release.Name) }}
{{- end }}

{{/* The cluster's name in Redis. */}}
{{- define "zipserve.cluster" -}}
{{ .Values.cluster | default (printf "%s.%s" .Release.Namespace .Release.Name) }}
{{- end }}

{{/* Labels by which a release finds its own pods. */}}
{{- define "zipserve.release" -}}
app.kubernetes.io/name: zipserve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The same of the services given: dict "root" $ "services" (list "router" …). */}}
{{- define "zipserve.pods" -}}
matchLabels:
  {{- include "zipserve.release" .root | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: {{ toJson .services }}}
{{- end }}

{{- define "zipserve.labels" -}}
{{ include "zipserve.release" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Labels of one component; see zipserve.components. */}}
{{- define "zipserve.selector" -}}
{{ include "zipserve.release" .root }}
app.kubernetes.io/component: {{ .component.service }}
zipserve.io/group: {{ .component.group | default "default" }}
{{- end }}

{{- define "zipserve.image" -}}
{{ .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "zipserve.clusterSecret" -}}
{{ .Values.clusterSecret | default (printf "%s-cluster" (include "zipserve.fullname" .)) }}
{{- end }}

{{- define "zipserve.apiKeySecret" -}}
{{ .Values.apiKeys.existingSecret | default (printf "%s-api-key" (include "zipserve.fullname" .)) }}
{{- end }}

{{- define "zipserve.redisSecret" -}}
{{- if .Values.redis.bundled.enabled }}{{ include "zipserve.fullname" . }}-redis
{{- else }}{{ .Values.redis.external.existingSecret }}{{ end }}
{{- end }}

{{- define "zipserve.tlsSecret" -}}
{{ .Values.tls.existingSecret | default (printf "%s-tls" (include "zipserve.fullname" .)) }}
{{- end }}

{{- define "zipserve.publicTlsSecret" -}}
{{ .Values.publicTls.existingSecret | default (printf "%s-public-tls" (include "zipserve.fullname" .)) }}
{{- end }}

{{/* The name in the certificates of all services: pods have no names of their own. */}}
{{- define "zipserve.tlsName" -}}
{{ .Values.tls.name | default (printf "%s.%s.zipserve.internal" (include "zipserve.fullname" .) .Release.Namespace) }}
{{- end }}

{{/* A quantity of memory in bytes. */}}
{{- define "zipserve.bytes" -}}
{{- $unit := regexFind "[A-Za-z]*$" (toString .) }}
{{- $factors := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 }}
{{- if not (hasKey $factors $unit) }}{{ fail (printf "%v is no quantity of memory: its unit must be one of k, M, G, T, Ki, Mi, Gi, Ti" .) }}{{ end }}
{{- mulf (float64 (trimSuffix $unit (toString .))) (get $factors $unit) | floor | int64 }}
{{- end }}

{{/* A setting's value as the environment has it: Helm's numbers are floats, and would be written as 1e+06. */}}
{{- define "zipserve.scalar" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end }}
{{- end }}

{{/* Names in a certificate, as a JSON list: dict "root" $ "name" tls or public-tls. */}}
{{- define "zipserve.certificateNames" -}}
{{- if eq .name "tls" }}
{{- list (include "zipserve.tlsName" .root) | toJson }}
{{- else if eq .root.Values.publicTls.mode "certManager" }}
{{- /* No public authority signs names that are known within a cluster only. */}}
{{- toJson .root.Values.publicTls.names }}
{{- else }}
{{- $service := printf "%s-router" (include "zipserve.fullname" .root) }}
{{- $within := list $service (printf "%s.%s" $service .root.Release.Namespace) (printf "%s.%s.svc" $service .root.Release.Namespace) }}
{{- concat $within (list (printf "%s.%s.svc.cluster.local" $service .root.Release.Namespace)) .root.Values.publicTls.names | toJson }}
{{- end }}
{{- end }}
