#!/usr/bin/env bash
# Builds the programs of the test cluster from Go modules into FINETUNE_BIN, each once: about 11 minutes cold on two cores, a second warm.
# `build.sh versitygw` builds the S3 server alone: all that the trainer's tests need, and no root is needed for it.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
bin=${FINETUNE_BIN:-${XDG_CACHE_HOME:-$HOME/.cache}/finetune-operator/bin}
kubernetes=1.36.3
mkdir -p "$bin"
export CGO_ENABLED=0 GOBIN=$bin GOFLAGS=-trimpath

# Two clones build into one folder: the second waits for the first, then finds everything there.
exec 9>"$bin/.lock"
flock -n 9 || { echo "waiting for another build of the cluster's programs" >&2; flock 9; }

say() { echo "building $1 (${2}; once)" >&2; }

build_kubernetes() {
  local wanted stamp
  wanted=$(cat "$here"/k8s/go.mod "$here"/k8s/go.sum "$here"/k8s/main.go | sha256sum)
  [ "$(cat "$bin/k8s.inputs" 2>/dev/null)" = "$wanted" ] && [ -x "$bin/k8s" ] && return
  say "Kubernetes $kubernetes" "5 minutes on two cores"
  stamp="-X k8s.io/component-base/version.gitVersion=v$kubernetes -X k8s.io/client-go/pkg/version.gitVersion=v$kubernetes"
  (cd "$here/k8s" && go build -ldflags "-s -w $stamp" -o "$bin/k8s.new" .)
  mv "$bin/k8s.new" "$bin/k8s"
  echo "$wanted" > "$bin/k8s.inputs"
}

build_small_programs() {  # a second each, so always; replaced by a rename, for a cluster may be running them
  local name
  for name in pause actor; do
    (cd "$here/k8s" && go build -ldflags "-s -w" -o "$bin/$name.new" "./$name")
    mv "$bin/$name.new" "$bin/$name"
  done
}

install_program() {
  local name=$1 module=$2 version=$3 stamp=$bin/.$1-$3
  [ -x "$bin/$name" ] && [ -e "$stamp" ] && return
  say "$name $version" "1 to 2 minutes on two cores"
  go install -ldflags "-s -w" "$module@$version"
  touch "$stamp"
}

install_program versitygw github.com/versity/versitygw/cmd/versitygw v1.8.0
[ "${1:-}" != versitygw ] || exit 0
build_kubernetes
build_small_programs
install_program helm helm.sh/helm/v4/cmd/helm v4.3.1
install_program coredns github.com/coredns/coredns v1.15.0
install_program kwok sigs.k8s.io/kwok/cmd/kwok v0.8.0
