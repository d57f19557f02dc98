#!/usr/bin/env bash
# Gets a machine ready for the cluster tests, or says why it can't: then they are left out, and under CI=true that is a failure.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

leave_out() {
  echo "the cluster and end-to-end tests are left out: $*" >&2
  [ "${CI:-}" != true ] || exit 1
  exit 0
}

[ "$(uname -s)" = Linux ] || leave_out "they need Linux, this is $(uname -s)"
command -v go >/dev/null || leave_out "they need Go >= 1.21, to build Kubernetes, helm and an S3 server"
"$here/build.sh" versitygw || leave_out "the S3 server could not be built"
[ "$(id -u)" = 0 ] || leave_out "they need root, to make namespaces and run containers"
"$here/packages.sh" || leave_out "Debian packages are missing"
"$here/build.sh" || leave_out "the cluster's programs could not be built"
