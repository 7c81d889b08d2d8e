{{- define "zipserve.rules" -}}
[]
{{- end }}
