"""The whole one-node Kubernetes of tests/cluster, as an object that tests hold: kubectl, waiting, images.

tests/conftest.py makes the fixture. FINETUNE_KUBECONFIG points the tests at a cluster that `make cluster` left running. No fixtures here.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.oci import write_missing_blobs

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune-operator"
BIN = Path(os.environ.get("FINETUNE_BIN", CACHE / "bin"))
UP = Path(__file__).parent.parent / "cluster" / "up.sh"
READY_SECONDS = 60


def what_is_missing(*, node: bool = True) -> str | None:
    """Why this machine can't run the cluster, with a real node or with fake ones, as a sentence; None when it can."""
    if node and os.environ.get("FINETUNE_KUBECONFIG"):
        return None
    if os.geteuid() != 0:
        return "the test cluster needs root, because it makes namespaces and runs containers"
    needed = ["ip", "openssl", "unshare", "setpriv", *(["containerd", "runc", "iptables", "conntrack"] if node else [])]
    programs = ("k8s", "pause", "actor", "coredns", "helm", "versitygw") if node else ("k8s", "kwok")
    missing = [name for name in needed if shutil.which(name) is None]
    missing += [name for name in programs if not (BIN / name).exists()]
    return f"the test cluster needs {', '.join(missing)}; `make cluster-setup` installs and builds them" if missing else None


@dataclass(frozen=True)
class Cluster:
    """A running cluster, by the folder that up.sh keeps it in and the number that its addresses have."""

    folder: Path
    number: int = 0

    @property
    def host(self) -> str:
        """Where its pods find the host's servers."""
        return f"10.89.{self.number}.1"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.folder / "admin.conf"

    def kubectl(self, *args: str, input: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:  # noqa: A002
        """Runs kubectl; on failure (with check) the error holds what kubectl said."""
        return _run(self.kubectl_command(*args), input=input, check=check)

    def kubectl_command(self, *args: str) -> list[str]:
        """The words of a kubectl, for a caller that runs it beside itself."""
        return [str(BIN / "k8s"), "kubectl", "--kubeconfig", str(self.kubeconfig), *args]

    def helm(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs helm against the cluster."""
        return _run([str(BIN / "helm"), "--kubeconfig", str(self.kubeconfig), *args], check=check)

    def get(self, *args: str) -> dict[str, Any]:
        """The object (or list) that `kubectl get ARGS` names; empty when there is none."""
        found = self.kubectl("get", *args, "-o", "json", "--ignore-not-found")
        return json.loads(found.stdout) if found.stdout.strip() else {}

    def make_secret(self, namespace: str, name: str, values: dict[str, str]) -> None:
        """A Secret of literal values."""
        literals = [f"--from-literal={key}={value}" for key, value in values.items()]
        self.kubectl("create", "secret", "generic", name, "-n", namespace, *literals)

    def wait(self, what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
        """Polls until the condition holds and returns what it returned; AssertionError naming `what` after the given seconds."""
        end = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds:.0f} s: {what}")
            time.sleep(0.3)
        return result

    def story(self, namespace: str) -> str:
        """What a person would look at first: the node's conditions and taints, the namespace's Jobs, pods and latest events."""
        node = "{range .items[*]}{.metadata.name}: {range .status.conditions[*]}{.type}={.status} {end}taints={.spec.taints}{end}"
        looks = (
            ("get", "nodes", "-o", f"jsonpath={node}"),
            ("get", "jobs,pods", "-n", namespace, "-o", "wide"),
            ("get", "events", "-n", namespace, "--sort-by=.metadata.creationTimestamp"),
        )
        return "\n".join(self.kubectl(*look, check=False).stdout[-4000:] for look in looks)

    def load_image(self, layout: Path, tag: str, name: str) -> str:
        """Gives the node an image from an OCI layout and returns its reference; only layers that the node lacks are sent."""
        reference = f"{name}:{tag}"
        if reference in self._ctr("images", "list", "-q").stdout.split():
            return reference
        present = frozenset(self._ctr("content", "list", "-q").stdout.split())
        with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
            write_missing_blobs(layout, tag, reference, present, Path(archive.name))
            self._ctr("images", "import", archive.name)
        return reference

    def import_archive(self, archive: Path) -> None:
        """Gives the node the images of a whole docker or OCI archive."""
        self._ctr("images", "import", str(archive))

    def _ctr(self, *args: str) -> subprocess.CompletedProcess[str]:
        return _run(["ctr", "--address", str(self.folder / "containerd.sock"), "--namespace", "k8s.io", *args])


def _run(command: list[str], *, input: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:  # noqa: A002
    done = subprocess.run(command, input=input, capture_output=True, text=True, check=False, timeout=600)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} exited {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done


@contextmanager
def running_cluster(folder: Path, number: int = 0, *, node: bool = True) -> Iterator[Cluster]:
    """The cluster of FINETUNE_KUBECONFIG, or one of our own that ends with the block, and with this process however it dies.

    Args:
        number: clusters of different numbers can run at the same time.
        node: whether it has a real node. One without is always our own, can run beside one with it, and takes a third of the memory.
    """
    existing = os.environ.get("FINETUNE_KUBECONFIG")
    if existing and node:
        yield Cluster(Path(existing).parent)
        return
    log = folder / "up.log"
    with log.open("w") as out:
        command = ["setpriv", "--pdeathsig", "TERM", str(UP), str(folder)]
        environment = {**os.environ, "CLUSTER_NUMBER": str(number), "CLUSTER_NODE": str(int(node))}
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        _await_ready(process, folder / "ready", log)
        yield Cluster(folder, number)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _await_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while not ready.exists():
        if process.poll() is not None:
            raise AssertionError(f"the cluster did not start:\n{log.read_text()}")
        if "waiting for another cluster" in log.read_text():
            end = time.monotonic() + READY_SECONDS  # pytest's own time limit ends this wait
        elif time.monotonic() > end:
            raise AssertionError(f"the cluster was not ready within {READY_SECONDS} s:\n{log.read_text()}")
        time.sleep(0.1)
