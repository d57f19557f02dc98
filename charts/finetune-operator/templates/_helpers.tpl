{{- define "finetune-operator.labels" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "finetune-operator.selector" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* What the operator may do: the same rules in a ClusterRole and in Roles. No Secrets, no wildcard, no write to a spec. */ -}}
{{- define "finetune-operator.rules" -}}
{{ .Files.Get "files/operator-rules.yaml" | trim }}
{{- end }}

{{- /* The names of a list of references, as JSON. */ -}}
{{- define "finetune-operator.names" -}}
{{- $names := list }}
{{- range . }}{{ $names = append $names .name }}{{ end }}
{{- toJson $names }}
{{- end }}

{{- /* A variable's value as it was set: in one, a kubelet turns $$ into $, and puts other variables of the container in for $(NAME). */ -}}
{{- define "finetune-operator.verbatim" -}}
{{ replace "$" "$$" . | quote }}
{{- end }}

{{- /* An image's reference. A digest stands alone: not every container runtime takes it behind a tag. */ -}}
{{- define "finetune-operator.image" -}}
{{ .image.repository }}{{ if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .version }}{{ end }}
{{- end }}
