{{/* Groups of Prometheus' rules: rules/rules.yaml with its words replaced and its runbooks named, and autoscaling. */}}
{{- define "zipserve.rules" -}}
{{- $slo := .Values.monitoring.slo }}
{{- $words := dict
  "SELECT" (include "zipserve.select" .)
  "FIRST_TOKEN_S" (include "zipserve.bound" $slo.firstTokenSeconds)
  "INTER_TOKEN_S" (include "zipserve.bound" $slo.interTokenSeconds)
  "ATTAINMENT" (toString $slo.attainment)
}}
{{- $text := .Files.Get "rules/rules.yaml" }}
{{- range $word, $value := $words }}{{ $text = replace $word $value $text }}{{ end }}
{{- $groups := fromYamlArray $text }}
{{- range $groups }}
  {{- range .rules }}
    {{- if and .alert $.Values.monitoring.rules.runbooks }}
      {{- $_ := set .annotations "runbook_url" (printf "%s/%s.md" (trimSuffix "/" $.Values.monitoring.rules.runbooks) .alert) }}
    {{- end }}
  {{- end }}
{{- end }}
{{- with include "zipserve.scalingRules" . | fromYamlArray }}
  {{- $groups = append $groups (dict "name" "zipserve.scaling" "rules" .) }}
{{- end }}
{{- toYaml $groups }}
{{- end }}

{{- define "zipserve.select" -}}
namespace={{ quote .Release.Namespace }}, release={{ quote .Release.Name }}
{{- end }}

{{/* A bucket's bound as its label has it. */}}
{{- define "zipserve.bound" -}}
{{- if eq (floor .) (float64 .) }}{{ printf "%.1f" (float64 .) }}{{ else }}{{ . }}{{ end }}
{{- end }}

{{/*
How many replicas each component that scales should have. Signals are in replicas; the largest one counts. Prefill workers
of all groups together keep to autoscaling.ratio. What HPA and KEDA are told is this sum with a target of 1 each.
*/}}
{{- define "zipserve.scalingRules" -}}
{{- $select := include "zipserve.select" . }}
{{- $bound := false }}
{{- range $component := include "zipserve.components" . | fromJsonArray }}
{{- if .scales }}
{{- $group := .group | default "default" }}
{{- $of := printf "%s, job=%q, group=%q" $select .service $group }}
{{- $pool := printf "sum by (namespace, release) (zipserve_kv_slabs{%s, arena=\"block\", state=\"used\"} / ignoring (state) sum without (state) (zipserve_kv_slabs{%s, arena=\"block\"}))" $of $of }}
{{- $signals := dict }}
{{- with .autoscaling.targets }}
{{- if eq $component.service "router" }}
  {{- /* On a router those that wait are among those that run. */}}
  {{- $_ := set $signals "requests" (printf "sum by (namespace, release) (zipserve_running_requests{%s}) / %v" $of .requests) }}
{{- else if eq $component.service "prefill" }}
  {{- $steps := printf "sum by (namespace, release) (rate(zipserve_step_seconds_sum{%s}[%%s]))" $of }}
  {{- $computed := printf "(sum by (namespace, release) (rate(zipserve_prompt_tokens_total{%s}[10m])) - sum by (namespace, release) (rate(zipserve_cached_prompt_tokens_total{%s}[10m])))" $of $of }}
  {{- /* Waiting tokens, over the tokens that a worker computes in a second of its steps. */}}
  {{- $_ := set $signals "queue" (printf "sum by (namespace, release) (zipserve_queued_tokens{%s}) * %s / (%s > 0) / %v" $of (printf $steps "10m") $computed .queueSeconds) }}
  {{- $_ := set $signals "busy" (printf "%s / %v" (printf $steps "2m") .busy) }}
{{- else if eq $component.service "decode" }}
  {{- $_ := set $signals "pool" (printf "%s / %v" $pool .poolUse) }}
  {{- $slots := mulf (dig "sequences_max" 32 $component.settings) .sequences }}
  {{- $_ := set $signals "sequences" (printf "sum by (namespace, release) (zipserve_running_requests{%s} + zipserve_queued_requests{%s} + zipserve_parked_requests{%s}) / %v" $of $of $of $slots) }}
{{- else }}
  {{- $_ := set $signals "pool" (printf "%s / %v" $pool .poolUse) }}
{{- end }}
{{- end }}
{{- range $signal, $expr := $signals }}
- record: zipserve:replicas_wanted:by_signal
  expr: {{ quote $expr }}
  labels: {service: {{ $component.service }}, group: {{ $group }}, signal: {{ $signal }}}
{{- end }}
{{- $wanted := printf "clamp(max without (signal) (zipserve:replicas_wanted:by_signal{%s, service=%q, group=%q}), %v, %v)" $select .service $group .autoscaling.min .autoscaling.max }}
{{- $bound = or $bound (eq .service "prefill") }}
- record: {{ eq .service "prefill" | ternary "zipserve:replicas_wanted:unbound" "zipserve:replicas_wanted" }}
  expr: {{ quote $wanted }}
  labels: {service: {{ .service }}, group: {{ $group }}}
{{- end }}
{{- end }}
{{- if $bound }}
{{- $prefills := printf "zipserve:replicas_wanted:unbound{%s}" $select }}
{{- $decodes := printf "scalar(count(zipserve_build_info{%s, job=\"decode\"}))" $select }}
{{- $total := printf "sum by (namespace, release) (%s)" $prefills }}
{{- with .Values.autoscaling.ratio }}
- record: zipserve:replicas_wanted
  expr: {{ printf "%s * on (namespace, release) group_left () (clamp(%s, %v * %s, %v * %s) / %s) > 0" $prefills $total .min $decodes .max $decodes $total | quote }}
  labels: {service: prefill}
{{- end }}
{{- end }}
{{- end }}
