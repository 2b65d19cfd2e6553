{{- define "larder.name" -}}
{{- if contains "larder" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-larder" (.Release.Name | trunc 43 | trimSuffix "-") }}{{ end }}
{{- end }}

{{- define "larder.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "larder.name" .) }}
{{- end }}

{{- define "larder.selector" -}}
app.kubernetes.io/name: larder
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "larder.labels" -}}
{{ include "larder.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "larder.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ with .Values.image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- /* The namespaces that are watched, as a JSON list; an empty one where it is all of them. */ -}}
{{- define "larder.namespaces" -}}
{{- if and .Values.clusterWide .Values.watchNamespaces }}
{{- fail "clusterWide keeps the CacheClusters of all namespaces: remove watchNamespaces, or write clusterWide: false" }}
{{- end -}}
{{ if .Values.clusterWide }}[]{{ else }}{{ .Values.watchNamespaces | default (list .Release.Namespace) | uniq | sortAlpha | toJson }}{{ end }}
{{- end }}

{{- define "larder.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "larder.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* The Service of the webhook, and the Secret with its certificate. */ -}}
{{- define "larder.injector" -}}
{{ include "larder.name" . }}-injector
{{- end }}

{{- /* It belongs to no namespace. */ -}}
{{- define "larder.injectorConfiguration" -}}
{{ .Release.Namespace }}-{{ include "larder.injector" . }}
{{- end }}
