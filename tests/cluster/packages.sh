#!/usr/bin/env bash
# Installs the Debian packages that the cluster and the image build need, when some are missing. Needs root and apt; called by `make cluster-setup`.
set -euo pipefail

declare -A package_of=(
  [containerd]=containerd [ctr]=containerd [runc]=runc [/usr/lib/cni/bridge]=containernetworking-plugins [iptables]=iptables
  [conntrack]=conntrack [ip]=iproute2 [openssl]=openssl [buildah]=buildah [mmdebstrap]=mmdebstrap
  [unshare]=util-linux [setpriv]=util-linux [pgrep]=procps
)

missing=()
for program in "${!package_of[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package_of[$program]}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

echo "installing Debian packages: ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -20 "$log" >&2
  echo "apt-get could not install ${missing[*]}; install them by hand and try again" >&2
  exit 1
fi
