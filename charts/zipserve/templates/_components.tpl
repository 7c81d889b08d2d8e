{{/*
What the release runs, as a JSON list: each service once, or once for each of its groups, with the values that hold for it.
A group's values go over those of its service, and a service's settings over those of all.
*/}}
{{- define "zipserve.components" -}}
{{- $components := list }}
{{- range $service := list "router" "prefill" "decode" "kvstore" }}
  {{- $common := get $.Values $service }}
  {{- range $group, $own := $common.groups | default (dict "" dict) }}
    {{- $values := mustMergeOverwrite (deepCopy (omit $common "groups")) (deepCopy ($own | default dict)) }}
    {{- $settings := mustMergeOverwrite (deepCopy $.Values.settings) ($values.settings | default dict) }}
    {{- $drain := float64 (dig "drain_s" 30 $settings) }}
    {{- $facts := dict
      "service" $service
      "group" $group
      "name" (list (include "zipserve.fullname" $) $service $group | compact | join "-")
      "title" (list $service $group | compact | join ".groups.")
      "isWorker" (has $service (list "prefill" "decode"))
      "holdsKv" (ne $service "router")
      "scales" (ne $values.autoscaling.kind "none")
      "codec" ($values.codec | default $.Values.codec)
      "settings" $settings
      "drainSeconds" $drain
      "graceSeconds" ($values.terminationGracePeriodSeconds | default (add $values.preStopSeconds (ceil $drain) 10))
    }}
    {{- if or (gt (int $values.replicas) 0) (ne $values.autoscaling.kind "none") }}
      {{- $components = append $components (mustMerge $facts $values) }}
    {{- end }}
  {{- end }}
{{- end }}
{{- toJson $components }}
{{- end }}

{{/* The settings that the chart itself knows, as a JSON object; those of values.yaml come on top. */}}
{{- define "zipserve.ownSettings" -}}
{{- $pod := .root.Values.ipv6 | ternary "[$(POD_IP)]" "$(POD_IP)" }}
{{- /* The router is there for everybody, a port-forward to the pod's loopback included. */}}
{{- $host := eq .component.service "router" | ternary (.root.Values.ipv6 | ternary "[::]" "0.0.0.0") $pod }}
{{- $own := dict
  "cluster" (include "zipserve.cluster" .root)
  "worker_id" "$(POD_NAME)"
  "redis_url" (include "zipserve.redisUrl" .root)
  "listen" (printf "%s:7000" $host)
  "advertise_host" $pod
  "metrics_port" 9400
}}
{{- if ne .root.Values.tls.mode "off" }}
  {{- $own = merge $own (dict
    "tls_cert" "/etc/zipserve/tls/tls.crt"
    "tls_key" "/etc/zipserve/tls/tls.key"
    "tls_ca" "/etc/zipserve/tls/ca.crt"
    "tls_name" (include "zipserve.tlsName" .root)) }}
{{- end }}
{{- if ne .component.service "kvstore" }}{{ $_ := set $own "model" .root.Values.model.name }}{{ end }}
{{- if .component.isWorker }}{{ $_ := set $own "codec" .component.codec }}{{ end }}
{{- if eq .component.service "router" }}
  {{- $_ := set $own "http_listen" (printf "%s:8000" $host) }}
  {{- if not .root.Values.apiKeys.open }}{{ $_ := set $own "keys_file" "/etc/zipserve/keys/keys.jsonl" }}{{ end }}
  {{- if ne .root.Values.publicTls.mode "off" }}
    {{- $_ := set $own "public_tls_cert" "/etc/zipserve/public-tls/tls.crt" }}
    {{- $_ := set $own "public_tls_key" "/etc/zipserve/public-tls/tls.key" }}
    {{- if .root.Values.publicTls.clientCa }}{{ $_ := set $own "public_tls_client_ca" "/etc/zipserve/public-tls/ca.crt" }}{{ end }}
  {{- end }}
{{- end }}
{{- if and (eq .component.service "kvstore") .component.disk.size }}
  {{- $_ := set $own "disk_path" "/var/lib/zipserve" }}
  {{- $_ := set $own "disk_bytes" (div (mul (include "zipserve.bytes" .component.disk.size | int64) 9) 10) }}
{{- end }}
{{- toJson $own }}
{{- end }}

{{- define "zipserve.redisUrl" -}}
{{- $external := .Values.redis.external }}
{{- if .Values.redis.bundled.enabled -}}
redis://zipserve:$(REDIS_PASSWORD)@{{ include "zipserve.fullname" . }}-redis:6379/0
{{- else -}}
{{ $external.tls.enabled | ternary "rediss" "redis" }}://
{{- if $external.existingSecret }}{{ $external.username }}:$(REDIS_PASSWORD)@{{ end -}}
{{ $external.host }}:{{ int $external.port }}/{{ int $external.database }}
{{- if $external.tls.caSecret }}?ssl_ca_certs=/etc/zipserve/redis-tls/ca.crt{{ end }}
{{- end }}
{{- end }}

{{/* The whole environment of a service's container. */}}
{{- define "zipserve.env" -}}
{{- $prefix := printf "ZIPSERVE_%s_" (upper .component.service) }}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- if include "zipserve.redisSecret" .root }}
- name: REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "zipserve.redisSecret" .root }}, key: password}}
{{- end }}
- name: {{ $prefix }}SECRET
  valueFrom: {secretKeyRef: {name: {{ include "zipserve.clusterSecret" .root }}, key: secret}}
{{- range $field, $value := merge (fromJson (include "zipserve.ownSettings" .)) .component.settings }}
- {name: {{ $prefix }}{{ upper $field }}, value: {{ include "zipserve.scalar" $value | quote }}}
{{- end }}
{{- if and .root.Values.model.tokenSecret (ne .component.service "kvstore") }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .root.Values.model.tokenSecret }}, key: token}}
{{- end }}
{{- with .root.Values.transfer }}
{{- if $.component.holdsKv }}
- {name: UCX_TCP_PORT_RANGE, value: "{{ int .ports.first }}-{{ int .ports.last }}"}
{{- with .ucxTls }}
- {name: UCX_TLS, value: {{ quote . }}}
{{- end }}
{{- with .ucxNetDevices }}
- {name: UCX_NET_DEVICES, value: {{ quote . }}}
{{- end }}
{{- end }}
{{- end }}
{{- with .component.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Volumes of a pod, as a JSON list of {volume, mount}. */}}
{{- define "zipserve.volumes" -}}
{{- $values := .root.Values }}
{{- $all := list
  (dict "mount" (dict "name" "cache" "mountPath" "/cache") "volume" (dict "emptyDir" (dict "sizeLimit" .component.cacheSize)))
  (dict "mount" (dict "name" "tmp" "mountPath" "/tmp") "volume" (dict "emptyDir" (dict "sizeLimit" "1Gi")))
  (dict "mount" (dict "name" "shm" "mountPath" "/dev/shm") "volume" (dict "emptyDir" (dict "medium" "Memory" "sizeLimit" .component.shmSize)))
}}
{{- if ne $values.tls.mode "off" }}
  {{- $all = append $all (include "zipserve.secretVolume" (list "tls" (include "zipserve.tlsSecret" .root)) | fromJson) }}
{{- end }}
{{- if and (not $values.redis.bundled.enabled) $values.redis.external.tls.caSecret }}
  {{- $all = append $all (include "zipserve.secretVolume" (list "redis-tls" $values.redis.external.tls.caSecret) | fromJson) }}
{{- end }}
{{- if and $values.model.volume (ne .component.service "kvstore") }}
  {{- $all = append $all (dict "mount" (dict "name" "models" "mountPath" "/models" "readOnly" true) "volume" $values.model.volume) }}
{{- end }}
{{- if eq .component.service "router" }}
  {{- if not $values.apiKeys.open }}
    {{- $all = append $all (include "zipserve.secretVolume" (list "keys" (include "zipserve.apiKeySecret" .root) "keys.jsonl") | fromJson) }}
  {{- end }}
  {{- if ne $values.publicTls.mode "off" }}
    {{- $all = append $all (include "zipserve.secretVolume" (list "public-tls" (include "zipserve.publicTlsSecret" .root)) | fromJson) }}
  {{- end }}
{{- end }}
{{- toJson $all }}
{{- end }}

{{/* list NAME SECRET [FILE]: the secret's files, or one of them, under /etc/zipserve/NAME. */}}
{{- define "zipserve.secretVolume" -}}
{{- $name := first . }}
{{- $secret := dict "secretName" (index . 1) "defaultMode" 288 }}
{{- range slice . 2 }}{{ $_ := set $secret "items" (list (dict "key" . "path" .)) }}{{ end }}
{{- dict
  "mount" (dict "name" $name "mountPath" (printf "/etc/zipserve/%s" $name) "readOnly" true)
  "volume" (dict "secret" $secret) | toJson }}
{{- end }}

{{/* Resources of a container, with those that RDMA needs. */}}
{{- define "zipserve.resources" -}}
{{- $resources := deepCopy .component.resources }}
{{- if and .root.Values.transfer.rdma.enabled .component.holdsKv }}
  {{- range $kind := list "requests" "limits" }}
    {{- $_ := set $resources $kind (merge (deepCopy $.root.Values.transfer.rdma.resources) (get $resources $kind | default dict)) }}
  {{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* What every container of ours may not do. */}}
{{- define "zipserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "zipserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* How fast an autoscaler goes up and down, given the seconds for a worker less. */}}
{{- define "zipserve.scaling" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies: [{type: Percent, value: 100, periodSeconds: 60}, {type: Pods, value: 2, periodSeconds: 60}]
# One at a time, and slowly: what leaves takes its cached KV with it.
scaleDown:
  stabilizationWindowSeconds: {{ . }}
  policies: [{type: Pods, value: 1, periodSeconds: {{ . }}}]
{{- end }}

{{/* Ports of the collectors of traces that services are told of, as a JSON list. */}}
{{- define "zipserve.collectorPorts" -}}
{{- $ports := list }}
{{- range include "zipserve.components" . | fromJsonArray }}
  {{- with dig "otlp_endpoint" "" .settings | urlParse }}
    {{- if .host }}
      {{- $port := regexFind ":[0-9]+$" .host | trimPrefix ":" | default (eq .scheme "http" | ternary "80" "443") }}
      {{- $ports = append $ports (int $port) }}
    {{- end }}
  {{- end }}
{{- end }}
{{- $ports | uniq | toJson }}
{{- end }}
