#!/usr/bin/env bash
# Gets a machine ready for the cluster tests, or says why it can't: then they are left out, and under CI=true that is a failure.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

leave_out() {
  echo "the cluster and end-to-end tests are left out: $*" >&2
  if [ "${CI:-}" = true ]; then exit 1; else exit 0; fi
}

[ "$(uname -s)" = Linux ] || leave_out "they need Linux, this is $(uname -s)"
[ "$(id -u)" = 0 ] || leave_out "they need root, to make namespaces and run containers"
command -v go >/dev/null || leave_out "they need Go >= 1.21, to build Kubernetes"
"$here/packages.sh" || leave_out "Debian packages are missing"
"$here/build.sh" || leave_out "the cluster's programs could not be built"
