#!/usr/bin/env bash
# Builds the images for real: images/build.sh [--in-time] operator|trainer... prints, for each, the OCI layout folder and the image's tag in it.
#
# With a Docker engine it uses that, else buildah (as root) on a Debian base image that mmdebstrap makes. The tag is a digest of everything that goes
# into the image, so an image that is there already is not built again. Callers: `make images`, the end-to-end test; and `make test` with
# --in-time (quiet, in the background, nothing on a machine that can't), so that the images are there when that test comes to them.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/finetune-operator/images
base_tag=localhost/finetune-base:bookworm-gcc  # a base that is there is reused: another content needs another tag
certificates=/etc/ssl/certs/ca-certificates.crt
mkdir -p "$cache"
export STORAGE_DRIVER=overlay
cd "$root"

say() { echo "$*" >&2; }

inputs_digest() {  # of the files that the Dockerfile of $1 copies, by name and content
  local packages="crds/finetune_api operator/finetune_operator trainer/finetune_trainer"
  find $packages "Dockerfile.$1" "requirements/$1.txt" pyproject.toml README.md -type f -not -path '*/__pycache__/*' -print0 \
    | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16
}

has_docker() { command -v docker >/dev/null && docker info >/dev/null 2>&1; }

has_buildah() { [ "$(id -u)" = 0 ] && command -v buildah >/dev/null && command -v mmdebstrap >/dev/null; }

require_buildah() {
  has_buildah && return
  say "images need a Docker engine, or root with buildah and mmdebstrap (tests/cluster/packages.sh installs them)"
  exit 1
}

make_base() {
  buildah inspect --type image "$base_tag" >/dev/null 2>&1 && return
  say "making a Debian base image (30 seconds; once)"
  local work
  work=$(mktemp -d)
  # gcc, libc6-dev and python3-dev are for Triton in the trainer's image (see Dockerfile.trainer).
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates,gcc,libc6-dev,python3-dev bookworm "$work/base.tar"
  printf 'FROM scratch\nADD base.tar /\n' > "$work/Dockerfile"
  run_buildah "$base_tag" "$work/Dockerfile" "$work"
  rm -rf "$work"
}

run_buildah() {  # run_buildah TAG DOCKERFILE CONTEXT OPTIONS...
  local tag=$1 dockerfile=$2 context=$3
  shift 3
  echo '{"default": [{"type": "insecureAcceptAnything"}]}' > "$cache/policy.json"
  buildah bud --quiet --layers --isolation chroot --network host --signature-policy "$cache/policy.json" \
    -v "$certificates:$certificates:ro" "$@" -t "$tag" -f "$dockerfile" "$context" >&2
}

# Pushing to an OCI layout compresses every layer anew, a minute for the trainer's requirements, but for layers that lie there uncompressed already.
keep_requirements() {
  local name=$1 image=localhost/finetune-$1:requirements blobs=$cache/$1/blobs/sha256 digest
  run_buildah "$image" "Dockerfile.$name" . --build-arg "BASE=$base_tag" --target requirements
  for digest in $(buildah inspect --type image --format '{{range .OCIv1.RootFS.DiffIDs}}{{.}} {{end}}' "$image"); do
    [ -e "$blobs/${digest#sha256:}" ] && continue
    rm -rf "$cache/$name.new"
    buildah push --quiet --disable-compression --signature-policy "$cache/policy.json" "$image" "dir:$cache/$name.new" >&2
    mkdir -p "$blobs"
    find "$cache/$name.new" -type f -regextype posix-extended -regex '.*/[0-9a-f]{64}' -exec mv -t "$blobs" {} +
    rm -rf "$cache/$name.new"
    return
  done
}

build_with_buildah() {
  local name=$1 tag=$2
  require_buildah
  make_base
  keep_requirements "$name"
  run_buildah "localhost/finetune-$name:$tag" "Dockerfile.$name" . --build-arg "BASE=$base_tag"
  say "writing the $name image to $cache/$name"
  buildah push --quiet --signature-policy "$cache/policy.json" "localhost/finetune-$name:$tag" "oci:$cache/$name:$tag" >&2
  # The folder has it now; older ones would pile up in buildah's own storage, and with them the layers of older requirements.
  buildah images --format '{{.Name}}:{{.Tag}}' | awk -F : -v name="localhost/finetune-$name" -v tag="$tag" '$1 == name && $2 != tag && $2 != "requirements"' | xargs -r buildah rmi --force >/dev/null
}

build_with_docker() {
  local name=$1 tag=$2
  docker build --quiet -t "localhost/finetune-$name:$tag" -f "Dockerfile.$name" . >&2
  mkdir -p "$cache/$name"
  docker save "localhost/finetune-$name:$tag" | tar -x -C "$cache/$name"
}

build() {
  local name=$1 tag
  tag=$(inputs_digest "$name")
  if ! grep -qs "\"$tag\"" "$cache/$name/index.json"; then
    say "building the $name image (the trainer's takes some minutes when its requirements changed, else seconds)"
    if has_docker; then build_with_docker "$name" "$tag"; else build_with_buildah "$name" "$tag"; fi
  fi
  echo "$cache/$name" "$tag"
}

if [ "${1:-}" = --in-time ]; then
  shift
  has_buildah || exit 0
  renice -n 10 $$ >/dev/null
  exec >"$cache/in-time.log" 2>&1
fi

# Two clones build one after the other.
exec 9>"$cache/.lock"
flock -n 9 || { say "waiting for another image build"; flock 9; }
for name in "$@"; do build "$name"; done
