{{/* Start of all names. Short enough for what KubeRay appends. */}}
{{- define "mini-studio.fullname" -}}
{{- ternary .Release.Name (printf "%s-mini-studio" .Release.Name) (contains "mini-studio" .Release.Name) | trunc 35 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels of an object; of a component where `component` is given. */}}
{{- define "mini-studio.labels" -}}
{{ include "mini-studio.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "mini-studio.selector" -}}
app.kubernetes.io/name: mini-studio
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "mini-studio.image" -}}
{{- with .image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.root.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end -}}

{{- define "mini-studio.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "mini-studio.rayAddress" -}}
{{- if .Values.ray.enabled -}}
http://{{ include "mini-studio.fullname" . }}-ray-head-svc.{{ .Release.Namespace }}.svc:8265
{{- else -}}
{{ required "ray.address is required where ray.enabled is false" .Values.ray.address }}
{{- end -}}
{{- end -}}

{{/* Name of the claim of a root (`models`, `dfs`) in the release's namespace, and of the models root in the models namespace. */}}
{{- define "mini-studio.claim" -}}
{{ (index .root.Values.storage .name).claim | default (printf "%s-%s" (include "mini-studio.fullname" .root) .name) }}
{{- end -}}
{{- define "mini-studio.modelsClaim" -}}
{{ .Values.storage.models.modelsNamespace.claim | default (printf "%s-models" (include "mini-studio.fullname" .)) }}
{{- end -}}

{{/*
The studio's processes: command, which secrets they get, which roots they see and how. Every one answers /health and /metrics on
port 8000, named http.
*/}}
{{- define "mini-studio.components" -}}
api: {command: [api], secrets: [mongo, s3, kafka, admin, ray], roots: {models: ro, dfs: rw}}
gateway: {command: [gateway], secrets: [kafka], roots: {}}
datasets: {command: [consume, datasets], secrets: [mongo, s3, kafka], roots: {dfs: rw}}
training: {command: [consume, training], secrets: [mongo, kafka, ray], roots: {models: rw}}
serving: {command: [consume, serving], secrets: [mongo, kafka], roots: {models: ro}}
jobs: {command: [consume, jobs], secrets: [mongo, kafka], roots: {}}
routes: {command: [consume, routes], secrets: [mongo, kafka], roots: {}}
usage: {command: [consume, usage], secrets: [mongo, kafka], roots: {}}
relay: {command: [relay], secrets: [mongo, kafka], roots: {}}
{{- end -}}

{{/* Values of a component: {root, component}. */}}
{{- define "mini-studio.values" -}}
{{ toYaml (get (merge (dict) .root.Values.consumers .root.Values) .component) }}
{{- end -}}

{{/* Consumer -> the topic it reads (mini_studio/bus/kafka.py has the same table). */}}
{{- define "mini-studio.topics" -}}
datasets: mini-studio.datasets
training: mini-studio.fine-tunes
serving: mini-studio.deployments
jobs: mini-studio.fine-tunes
routes: mini-studio.deployments
usage: mini-studio.usage
{{- end -}}

{{/* The studio's settings that are no secrets, as environment variables; those of the values win. */}}
{{- define "mini-studio.settings" -}}
{{- merge (dict) .Values.settings (include "mini-studio.ownSettings" . | fromYaml) | toYaml -}}
{{- end -}}
{{- define "mini-studio.ownSettings" -}}
{{- $v := .Values -}}
MINI_STUDIO_PRODUCTION: "true"
MINI_STUDIO_DATA: /data
MINI_STUDIO_MODELS_ROOT: /models
MINI_STUDIO_DFS_ROOT: /dfs
MINI_STUDIO_LOG__FORMAT: json
MINI_STUDIO_LOG__LEVEL: {{ $v.logLevel }}
MINI_STUDIO_HEALTH_HOST: 0.0.0.0
MINI_STUDIO_HEALTH_PORT: "8000"
MINI_STUDIO_KAFKA__BOOTSTRAP: {{ $v.kafka.bootstrap | quote }}
MINI_STUDIO_KAFKA__PARTITIONS: {{ $v.kafka.partitions | quote }}
MINI_STUDIO_KAFKA__REPLICATION: {{ $v.kafka.replication | quote }}
MINI_STUDIO_KAFKA__RETENTION_MS: {{ $v.kafka.retentionMs | int64 | quote }}
MINI_STUDIO_KAFKA__IDEMPOTENT: "true"
MINI_STUDIO_KAFKA__SECURITY: {{ $v.kafka.security }}
{{- if hasPrefix "sasl" $v.kafka.security }}
MINI_STUDIO_KAFKA__SASL_MECHANISM: {{ $v.kafka.saslMechanism }}
{{- end }}
{{- if $v.kafka.caConfigMap }}
MINI_STUDIO_KAFKA__CA_FILE: /etc/mini-studio/kafka/ca.crt
{{- end }}
MINI_STUDIO_RECORDS__MONGO_DATABASE: {{ $v.records.database }}
MINI_STUDIO_S3__ENDPOINT: {{ $v.s3.endpoint | quote }}
MINI_STUDIO_S3__BUCKET: {{ $v.s3.bucket | quote }}
MINI_STUDIO_S3__REGION: {{ $v.s3.region }}
MINI_STUDIO_S3__ADDRESSING: {{ $v.s3.addressing }}
{{- if $v.s3.caConfigMap }}
MINI_STUDIO_S3__CA_FILE: /etc/mini-studio/s3/ca.crt
{{- end }}
MINI_STUDIO_TRAINING__MAX_RUNNING: {{ $v.training.maxRunning | quote }}
MINI_STUDIO_TRAINING__WORKERS: {{ $v.training.workers | quote }}
MINI_STUDIO_TRAINING__CPUS: {{ $v.training.cpus | quote }}
MINI_STUDIO_TRAINING__GPUS: {{ $v.training.gpus | quote }}
MINI_STUDIO_TRAINING__THREADS: {{ $v.training.cpus | quote }}
MINI_STUDIO_SERVING__DRIVER: kubernetes
{{- with $v.modelServers }}
MINI_STUDIO_SERVING__KUBERNETES__NAMESPACE: {{ $v.modelsNamespace.name }}
MINI_STUDIO_SERVING__KUBERNETES__GATEWAY_NAMESPACE: {{ $.Release.Namespace }}
MINI_STUDIO_SERVING__KUBERNETES__GATEWAY_LABELS: {{ include "mini-studio.selector" (dict "root" $ "component" "gateway") | fromYaml | toJson | squote }}
MINI_STUDIO_SERVING__KUBERNETES__RUNTIME: {{ .runtime }}
MINI_STUDIO_SERVING__KUBERNETES__VLLM_IMAGE: {{ .vllmImage | quote }}
MINI_STUDIO_SERVING__KUBERNETES__SERVER_IMAGE: {{ .serverImage | quote }}
MINI_STUDIO_SERVING__KUBERNETES__IMAGE_PULL_SECRETS: {{ .imagePullSecrets | toJson | squote }}
MINI_STUDIO_SERVING__KUBERNETES__MODELS_CLAIM: {{ include "mini-studio.modelsClaim" $ }}
{{- with .cacheClaim }}
MINI_STUDIO_SERVING__KUBERNETES__CACHE_CLAIM: {{ . }}
{{- end }}
MINI_STUDIO_SERVING__KUBERNETES__CACHE_SIZE: {{ .cacheSize }}
MINI_STUDIO_SERVING__KUBERNETES__CPU: {{ .cpu | quote }}
MINI_STUDIO_SERVING__KUBERNETES__MEMORY: {{ .memory }}
MINI_STUDIO_SERVING__KUBERNETES__GPU_RESOURCE: {{ .gpuResource }}
MINI_STUDIO_SERVING__KUBERNETES__NODE_SELECTOR: {{ .nodeSelector | toJson | squote }}
MINI_STUDIO_SERVING__KUBERNETES__TOLERATIONS: {{ .tolerations | toJson | squote }}
MINI_STUDIO_SERVING__KUBERNETES__HUB_EGRESS: {{ .hubEgress | toJson | squote }}
MINI_STUDIO_SERVING__KUBERNETES__PROMETHEUS: {{ $v.metrics.prometheus | quote }}
{{- end }}
{{- end -}}

{{/* Environment from secrets, by reference, and where what they open is: {root, secrets}. */}}
{{- define "mini-studio.secretEnv" -}}
{{- $s := .root.Values.secrets -}}
{{- $all := dict
  "mongo" (dict "MINI_STUDIO_RECORDS__MONGO_URL" $s.mongo.key)
  "admin" (dict "MINI_STUDIO_API__ADMIN_TOKEN" $s.admin.key)
  "ray" (dict "MINI_STUDIO_TRAINING__RAY_TOKEN" $s.ray.key)
  "s3" (dict "MINI_STUDIO_S3__ACCESS_KEY" $s.s3.accessKey "MINI_STUDIO_S3__SECRET_KEY" $s.s3.secretKey)
  "kafka" (dict "MINI_STUDIO_KAFKA__USERNAME" $s.kafka.username "MINI_STUDIO_KAFKA__PASSWORD" $s.kafka.password) -}}
{{- range $secret := .secrets }}
{{- with (index $s $secret).name }}
{{- range $variable, $key := index $all $secret }}
- {name: {{ $variable }}, valueFrom: {secretKeyRef: {name: {{ index $s $secret "name" }}, key: {{ $key }}}}}
{{- end }}
{{- end }}
{{- end }}
{{- if has "ray" .secrets }}
- {name: MINI_STUDIO_TRAINING__RAY_ADDRESS, value: {{ include "mini-studio.rayAddress" .root | quote }}}
{{- end }}
{{- end -}}

{{/* Pods of the studio run as anybody but root, with nothing that the kernel or the cluster would give them. */}}
{{- define "mini-studio.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.runAs.user }}
runAsGroup: {{ int64 .Values.runAs.group }}
fsGroup: {{ int64 .Values.runAs.group }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}
{{- define "mini-studio.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Volumes and where they are mounted: {root, roots}. */}}
{{- define "mini-studio.volumes" -}}
- {name: tmp, emptyDir: {sizeLimit: 2Gi}}
- {name: data, emptyDir: {sizeLimit: 1Gi}}
{{- range $name, $mode := .roots }}
- {name: {{ $name }}, persistentVolumeClaim: {claimName: {{ include "mini-studio.claim" (dict "root" $.root "name" $name) }}}}
{{- end }}
{{- range $name := list "kafka" "s3" }}
{{- with (index $.root.Values $name).caConfigMap }}
- {name: ca-{{ $name }}, configMap: {name: {{ . }}}}
{{- end }}
{{- end }}
{{- end -}}
{{- define "mini-studio.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: data, mountPath: /data}
{{- range $name, $mode := .roots }}
- {name: {{ $name }}, mountPath: /{{ $name }}, readOnly: {{ eq $mode "ro" }}}
{{- end }}
{{- range $name := list "kafka" "s3" }}
{{- if (index $.root.Values $name).caConfigMap }}
- {name: ca-{{ $name }}, mountPath: /etc/mini-studio/{{ $name }}, readOnly: true}
{{- end }}
{{- end }}
{{- end -}}

{{/* Where pods of a component may run: {root, component}. */}}
{{- define "mini-studio.scheduling" -}}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .root.Values.topologySpread.enabled }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ .root.Values.topologySpread.topologyKey }}
    whenUnsatisfiable: {{ .root.Values.topologySpread.whenUnsatisfiable }}
    labelSelector:
      matchLabels: {{- include "mini-studio.selector" . | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end -}}
