#!/usr/bin/env bash
# A whole one-node Kubernetes on this machine, as root, in namespaces of its own: etcd, API server, controller manager, scheduler, kube-proxy,
# CoreDNS, containerd and a real kubelet. Nothing of it touches the host's network or mounts, and all of it dies with this process, which stays
# in the foreground.
#
#   tests/cluster/up.sh DIR        ready when DIR/ready exists; then KUBECONFIG=DIR/admin.conf
#
# From the host the API server is https://10.89.N.2:6443 (a veth into the cluster's namespace) and containerd is DIR/containerd.sock; pods reach the
# host at 10.89.N.1. N is CLUSTER_NUMBER (0 to 255; 0 unless given): a second cluster of the same number waits for the first to end.
# CLUSTER_NODE=0 leaves the node out; tests/support/kwok.py adds fake ones. Only one cluster at a time can have a real node (containerd's images).
# CLUSTER_API_SERVER_FLAGS are given to the API server, last.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/finetune-operator
bin=${FINETUNE_BIN:-$cache/bin}
k8s=$bin/k8s
number=${CLUSTER_NUMBER:-0}
with_node=${CLUSTER_NODE:-1}
host_address=10.89.$number.1
node_address=10.89.$number.2
wire=ftj$number
lock=/run/lock/finetune-cluster
[ "$number" = 0 ] || lock+=-$number
dns_address=10.96.0.10
pod_network=10.88.0.0/16
service_network=10.96.0.0/16

# --- outside: the namespaces and the wire into them -----------------------------------------------------------------------------------------

take_the_addresses() {
  exec 9>"$lock.lock"
  flock -n 9 && return
  echo "waiting for another cluster $number on this machine to end (process $(cat "$lock.pid" 2>/dev/null || echo unknown))" >&2
  flock 9
}

stop_inside() {  # SIGKILL: unshare holds SIGTERM back, and --kill-child passes its own death on to the whole PID namespace
  kill -9 "$outer" 2>/dev/null || true
  wait "$outer" 2>/dev/null || true
  rm -f "$dir/ready"
  [ "$with_node" != 0 ] || return 0
  local hierarchy
  for hierarchy in /sys/fs/cgroup/kubepods /sys/fs/cgroup/*/kubepods; do
    [ ! -d "$hierarchy" ] || find "$hierarchy" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
}

run_outside() {
  dir=$(realpath -m "$1")
  mkdir -p "$dir"
  rm -f "$dir/ready"
  take_the_addresses
  echo $$ > "$lock.pid"
  ip link del "$wire" 2>/dev/null || true
  CLUSTER_INSIDE=1 setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc "${BASH_SOURCE[0]}" "$dir" &
  outer=$!
  trap stop_inside EXIT
  trap 'exit 143' TERM INT
  local inner
  until inner=$(pgrep -P "$outer" | head -1) && [ -n "$inner" ]; do sleep .05; done
  ip link add "$wire" type veth peer name inside netns "$inner"
  ip addr add "$host_address/24" dev "$wire"
  ip link set "$wire" up
  wait "$outer"
}

# --- inside: the components -----------------------------------------------------------------------------------------------------------------

start() {
  local name=$1
  shift
  "$@" > "log/$name.log" 2>&1 &
  echo $! > "log/$name.pid"
}

await() {  # await COMPONENT COMMAND...: until the command succeeds; the end of the component's log if it dies first
  local name=$1
  shift
  until "$@" >/dev/null 2>&1; do
    kill -0 "$(cat "log/$name.pid")" 2>/dev/null || { echo "$name stopped:"; tail -5 "log/$name.log"; exit 1; } >&2
    sleep .1
  done
}

prepare_namespaces() {
  ip link set lo up
  until ip link show inside >/dev/null 2>&1; do sleep .05; done
  ip addr add "$node_address/24" dev inside
  ip link set inside up
  ip route add default via "$host_address"
  sysctl -qw net.ipv4.ip_forward=1
  mount -t tmpfs tmpfs /run  # sockets and locks of our own
}

write_credentials() {
  [ -f sa.key ] || { openssl genrsa -out sa.key 2048; openssl rsa -in sa.key -pubout -out sa.pub; } 2>/dev/null
  local token
  token=$(openssl rand -hex 16)
  (umask 077; echo "$token,admin,admin,system:masters" > tokens.csv; cat > admin.conf <<C
apiVersion: v1
kind: Config
clusters: [{name: finetune, cluster: {server: "https://$node_address:6443", certificate-authority: "$dir/cert/apiserver.crt", tls-server-name: kubernetes.default.svc}}]
users: [{name: admin, user: {token: "$token"}}]
contexts: [{name: finetune, context: {cluster: finetune, user: admin}}]
current-context: finetune
C
  )
  export KUBECONFIG=$dir/admin.conf
}

# What service accounts of tests ask for, the operator's among them, goes to log/audit.log; the cluster's own components and the administrator do not.
write_audit_policy() {
  rm -f log/audit.log
  cat > audit.yaml <<C
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - {level: None, userGroups: ["system:serviceaccounts:kube-system"]}
  - {level: Metadata, userGroups: ["system:serviceaccounts"]}
C
}

start_control_plane() {
  write_audit_policy
  start etcd "$k8s" etcd --data-dir etcd --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 --unsafe-no-fsync --log-level error
  start apiserver "$k8s" kube-apiserver --etcd-servers http://127.0.0.1:2379 --bind-address "$node_address" --advertise-address "$node_address" \
    --secure-port 6443 --cert-dir cert --service-account-key-file sa.pub --service-account-signing-key-file sa.key \
    --service-account-issuer https://kubernetes.default.svc --token-auth-file tokens.csv --authorization-mode Node,RBAC \
    --service-cluster-ip-range "$service_network" --kubelet-preferred-address-types InternalIP --enable-aggregator-routing --allow-privileged \
    --audit-policy-file audit.yaml --audit-log-path log/audit.log --audit-log-maxsize 50 --audit-log-maxbackup 1 ${CLUSTER_API_SERVER_FLAGS:-}
  await apiserver "$k8s" kubectl get --raw /readyz
  start controllers "$k8s" kube-controller-manager --kubeconfig admin.conf --service-account-private-key-file sa.key --use-service-account-credentials \
    --root-ca-file cert/apiserver.crt --leader-elect=false --kube-api-qps 1000 --kube-api-burst 2000 --concurrent-job-syncs 32
  start scheduler "$k8s" kube-scheduler --kubeconfig admin.conf --leader-elect=false --kube-api-qps 1000 --kube-api-burst 2000
}

write_node_configuration() {
  cat > containerd.toml <<C
version = 2
root = "$images"
state = "/run/containerd"
[grpc]
  address = "$dir/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$dir/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true        # without CAP_SYS_RESOURCE runc could not set pause's -998
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$dir/cni"
C
  cat > cni/10-pods.conflist <<C
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "pods", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "/run/ipam", "ranges": [[{"subnet": "$pod_network"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
C
  cat > kubelet.yaml <<C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $node_address
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
failCgroupV1: false                    # machines with cgroup v1 can run the tests too
cgroupDriver: cgroupfs
failSwapOn: false
containerRuntimeEndpoint: unix://$dir/containerd.sock
clusterDNS: [$dns_address]
clusterDomain: cluster.local
resolvConf: $dir/resolv.conf
imageGCHighThresholdPercent: 100
volumeStatsAggPeriod: 5s               # by default an emptyDir is measured every one to two minutes, at random
# The machine is not the node's alone: tests and image builds fill its memory and disk too, and page cache counts as used. No pod may pay for that.
evictionHard: {memory.available: 0%, nodefs.available: 0%, imagefs.available: 0%, nodefs.inodesFree: 0%}
C
  cat > Corefile <<C
.:53 {
  bind $dns_address
  errors
  kubernetes cluster.local in-addr.arpa ip6.arpa {
    kubeconfig $dir/admin.conf
    pods insecure
  }
}
C
  echo "nameserver 127.0.0.1" > resolv.conf
}

# containerd's images outlive the cluster (the trainer's is several GB), the containers of the last cluster must not.
start_container_runtime() {
  local ctr=(ctr -a "$dir/containerd.sock" -n k8s.io)
  start containerd containerd -c containerd.toml
  await containerd "${ctr[@]}" version
  local stale
  stale=$("${ctr[@]}" containers list -q)
  if [ -n "$stale" ]; then
    "${ctr[@]}" containers rm $stale > log/stale-containers.log 2>&1 || true
    kill "$(cat log/containerd.pid)"
    wait "$(cat log/containerd.pid)" || true
    start containerd containerd -c containerd.toml
    await containerd "${ctr[@]}" version
  fi
  python3 "$here/image.py" localhost/pause:1 pause.tar '["/pause"]' "$bin/pause:/pause"
  "${ctr[@]}" images import pause.tar > log/images.log 2>&1
}

start_node() {
  write_node_configuration
  start_container_runtime
  start kubelet "$k8s" kubelet --config kubelet.yaml --kubeconfig admin.conf --root-dir "$dir/kubelet" --hostname-override node1 --node-ip "$node_address"
  start proxy "$k8s" kube-proxy --kubeconfig admin.conf --proxy-mode iptables --cluster-cidr "$pod_network" --hostname-override node1 \
    --conntrack-max-per-core 0 --conntrack-tcp-timeout-established 0 --conntrack-tcp-timeout-close-wait 0
  ip link add dns type bridge
  ip addr add "$dns_address/32" dev dns
  ip link set dns up
  start dns "$bin/coredns" -conf Corefile
  await kubelet "$k8s" kubectl wait node/node1 --for=condition=Ready --timeout=1s
  # What a GPU node looks like to the scheduler; the container gets no device.
  "$k8s" kubectl patch node node1 --subresource=status --type=json -p '[
    {"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "4"},
    {"op": "add", "path": "/status/allocatable/nvidia.com~1gpu", "value": "4"}]' >/dev/null
}

run_inside() {
  dir=$1
  images=${CLUSTER_IMAGES:-$cache/containerd}
  cd "$dir"
  rm -rf etcd kubelet cert
  mkdir -p log cni cert "$images"
  prepare_namespaces
  write_credentials
  start_control_plane
  [ "$with_node" = 0 ] || start_node
  await controllers "$k8s" kubectl get serviceaccount default
  touch ready
  echo "ready: KUBECONFIG=$dir/admin.conf"
  wait -n
  echo "a component stopped; see $dir/log" >&2
  exit 1
}

if [ -n "${CLUSTER_INSIDE:-}" ]; then run_inside "$@"; else run_outside "$@"; fi
